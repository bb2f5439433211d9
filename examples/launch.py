"""Shared by the entry scripts: process group, Hydra, errors, and a clean end on every rank."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from override_errors import explain
from torch import distributed as dist

from torchrec_hilomoe.errors import ConfigError, HiLoMoEError
from torchrec_hilomoe.training import (
    TrainingInterrupted,
    init_process_group,
    is_main_rank,
    once_per_launch,
    shutdown,
)

CONF = Path(__file__).resolve().parent.parent / "conf"


class _JobError(Exception):
    """Its error has been printed; Hydra goes on with the other jobs of a multirun."""


def launch(
    task: Callable[[dict[str, Any], DictConfig], dict[str, Any]],
    config_name: str,
    objective: Callable[[DictConfig, dict[str, Any]], float | None] | None = None,
) -> NoReturn:
    """Composes the configuration on every rank, runs the task, prints its result, and exits.

    The process group comes first, so that all ranks agree on the time in the default output folder.

    Args:
        task (Callable): takes the composed configuration, plain and as it was, and returns the
            JSON object that rank 0 prints as its last line.
        config_name (str): of the YAML file in ``conf``.
        objective (Callable | None): what Hydra's sweepers optimise, from the configuration and the
            task's result.
    """
    warnings.filterwarnings("ignore", module=r"torchrec(\.|$)|torch\.distributed")
    warnings.filterwarnings("ignore", message=".*ShardedTensor")  # TorchRec's state dicts
    # Of FBGEMM's dense kernel: its gradients are those of torch's own lookup.
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
    # TorchRec's planner warns of every replicated table that it is on no rank alone.
    logging.getLogger().addFilter(lambda record: "Sharding spec not found" not in str(record.msg))
    sys.path.insert(0, os.getcwd())  # for plugins
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises, and the message is printed here
    try:
        init_process_group()
    except HiLoMoEError as error:  # another rank is not there
        print(f"error on rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        shutdown(1)
    # Time and chance: two launches may begin within a second.
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(3)}"
    name = once_per_launch("output_name", name)
    OmegaConf.register_new_resolver("launch", lambda: name)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def run(config: DictConfig) -> float | None:
        # Hydra would cut tracebacks short and add its own advice to every error.
        try:
            _refuse_hidden()
            values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            result = task(cast(dict[str, Any], values), config)
        except TrainingInterrupted as ended:
            if is_main_rank():
                print(ended, file=sys.stderr)
            raise SystemExit(ended.exit_code) from None
        except (HiLoMoEError, OmegaConfBaseException) as error:
            raise _ended(error, name) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        if is_main_rank():
            print(json.dumps(result), flush=True)
        return objective(config, result) if objective is not None else None

    exit_code = 0
    try:
        run()
    except SystemExit as ended:
        exit_code = ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:  # while data are encoded; a training ends by itself
        print("ended by SIGINT", file=sys.stderr)
        exit_code = 128 + signal.SIGINT
    except _JobError:
        exit_code = 1
    except Exception as error:  # Hydra's, of what it cannot compose
        given = " ".join(sys.argv[1:])
        message = explain(error, CONF)
        print(f"error on rank {dist.get_rank()}: {message}\nGiven: {given}", file=sys.stderr)
        exit_code = 1
    shutdown(exit_code)


def _refuse_hidden() -> None:
    """Refuses a file of --config-dir in whose place Hydra reads a shipped one of the same name."""
    folders = {source.provider: source.path for source in HydraConfig.get().runtime.config_sources}
    if "command-line" not in folders:
        return
    shipped, own = Path(folders["main"]), Path(folders["command-line"])
    names = [path.relative_to(shipped) for path in shipped.glob("*/*.yaml")]
    if any(argument.startswith(("--config-name", "-cn")) for argument in sys.argv):
        names.append(Path(cast(str, HydraConfig.get().job.config_name)).with_suffix(".yaml"))
    for name in names:
        hidden, read = own / name, shipped / name
        if hidden.is_file() and read.is_file() and hidden.read_bytes() != read.read_bytes():
            raise ConfigError(
                f"{hidden}: would not be read, since the shipped {read} has the same name; give "
                "it another one"
            )


def _ended(error: Exception, output_name: str) -> BaseException:
    """Says what was wrong; returns what to raise."""
    hydra_config = HydraConfig.get()
    is_multirun = hydra_config.mode == RunMode.MULTIRUN
    job = f", job {hydra_config.job.num}" if is_multirun else ""
    print(f"error on rank {dist.get_rank()}{job}: {error}", file=sys.stderr)
    output_dir = Path(hydra_config.runtime.output_dir)
    if output_dir.name == output_name:  # made by Hydra, for no run
        with suppress(OSError):  # not empty, or removed by another rank
            output_dir.rmdir()
    # Of several ranks, one alone may be here.
    goes_on = is_multirun and dist.get_world_size() == 1
    return _JobError() if goes_on else SystemExit(1)
