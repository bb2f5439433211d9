"""Latency of one request and of batches, of a model in every form in which it can serve.

python benchmarks/serving.py --json FILE                    # five minutes, most of them compiling
python benchmarks/serving.py --quick --models hilomoe model.embedding_dim=64
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from runs import run_config
from serving_forms import Form, serving_forms
from timing import keep_freed_memory

from torchrec_hilomoe.data import FeatureSpec, SparseFeature
from torchrec_hilomoe.inference import FlatInputs, Request
from torchrec_hilomoe.models import ModelConfig, build_model
from torchrec_hilomoe.training import init_tables, make_tables

# Criteo's features, with as many rows in each table as fit a small machine.
FEATURES = FeatureSpec(
    dense=tuple(f"I{i}" for i in range(1, 14)),
    sparse=tuple(SparseFeature(f"C{i}", 50_000) for i in range(1, 27)),
)
ROUNDS = {1: 1000, 128: 300, 2048: 60}  # requests of each form, by samples in a request


def main() -> None:
    """Measures, prints a table and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--models", default="hilomoe,dlrm_cat", help="names of conf/model")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, no inductor")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every model")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)

    print("| model | form | logits differ by | p50, p99 in ms of B 1 | B 128 | B 2048 |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in args.models.split(","):
        model = serving_model(run_config(name, args.overrides).model)
        with torch.inference_mode():
            forms = serving_forms(model, inductor=not args.quick)
            differences = logit_differences(forms, random_request(512, seed=1))
            latencies = {
                size: latency(forms, size, rounds // 10 if args.quick else rounds)
                for size, rounds in ROUNDS.items()
            }
        for form, difference in differences.items():
            of_form = {size: by_form[form] for size, by_form in latencies.items()}
            rows.append({"model": name, "form": form, "difference": difference, "ms": of_form})
            cells = " | ".join(f"{p50:.3f}, {p99:.3f}" for p50, p99 in of_form.values())
            print(f"| {name} | {form} | {difference:.1e} | {cells} |", flush=True)
    if args.json:
        machine = {"torch": torch.__version__, "threads": 1, "load": os.getloadavg()[0]}
        args.json.write_text(json.dumps({"serving": rows, "machine": machine}, indent=1))


def serving_model(config: ModelConfig) -> FlatInputs:
    """An unsharded model of random weights whose experts are not silent."""
    torch.manual_seed(0)
    tables = make_tables(FEATURES, config.table_dim).to_empty(device="cpu")
    model = build_model(config, tables, len(FEATURES.dense))
    init_tables(model, seed=0, std=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("expert_u"):
            torch.nn.init.normal_(parameter, std=0.1)
    keys = [feature.name for feature in FEATURES.sparse]
    return FlatInputs(model, keys, len(FEATURES.dense)).eval()


def random_request(samples: int, seed: int = 0) -> Request:
    """One id for each feature of each sample."""
    generator = torch.Generator().manual_seed(seed)
    bags = samples * len(FEATURES.sparse)
    ids = torch.randint(FEATURES.sparse[0].num_embeddings, (bags,), generator=generator)
    dense = torch.rand(samples, len(FEATURES.dense), generator=generator)
    return dense, ids, torch.ones(bags, dtype=torch.int32)


def logit_differences(forms: Mapping[str, Form], request: Request) -> dict[str, float]:
    """The largest difference of any logit from the eager model's."""
    expected = forms["eager"](*request)
    return {name: (form(*request) - expected).abs().max().item() for name, form in forms.items()}


def latency(forms: Mapping[str, Form], samples: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of CPU time of a request, p50 and p99 of each form; they take turns."""
    requests = [random_request(samples, seed) for seed in range(16)]
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in range(-10, rounds):  # TorchScript optimises in its first runs
        request = requests[repetition % len(requests)]
        for name, form in forms.items():
            start = time.process_time()
            form(*request)
            if repetition >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: _percentiles(values) for name, values in seconds.items()}


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p99 = (1e3 * torch.tensor(seconds).quantile(torch.tensor([0.5, 0.99]))).tolist()
    return round(p50, 4), round(p99, 4)


if __name__ == "__main__":
    main()
