"""TorchRec HiLoMoE."""
