"""The GPU table of docs/benchmarks.md: decode, depth, prefill and batches of three shapes, beside the ceiling.

    python benchmarks/gpu.py                      all of it, about five minutes on an H100
    python benchmarks/gpu.py --models llama-3.2-1b --repetitions 3

Random int8 weights; every row's ceiling is the read bandwidth measured in turn with its repetitions.
"""

from __future__ import annotations

import argparse
import sys

from numbainfer.bench import Bench, Test
from numbainfer.device import Device
from numbainfer.random_weights import RandomWeights

MODELS = ["qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b"]
TESTS = ["tg128@d128", "tg128@d8192", "pp512", "pp2048", "tg64@d128@b32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="as `numbainfer bench` names them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print("| model | test | tokens/s | us/token | GB/s | ceiling GB/s | % | load s | device |\n|" + "---|" * 9)
    for model in arguments.models:
        for name in arguments.tests:  # each by itself: a deep test needs a cache that a batch of 32 would multiply
            test = Test.parse(name)
            bench = Bench(lambda model=model: RandomWeights(model), Device.parse(arguments.device), [test])
            for row in bench.run(arguments.repetitions):
                rate = row["tokens_per_second"]
                moved, ceiling = row["bytes_per_second"] / 1e9, row["bandwidth_ceiling"] / 1e9
                print(
                    f"| {model} | {row['test']} | {rate:,.0f} | {1e6 / rate:,.1f} | {moved:,.0f} | {ceiling:,.0f} | "
                    f"{row['percent_of_ceiling']:.0f} | {row['load_seconds']:.1f} | {row['device_name']} |"
                )
                sys.stdout.flush()
            bench.model.release()
            bench.ops.pool.trim()


if __name__ == "__main__":
    main()
