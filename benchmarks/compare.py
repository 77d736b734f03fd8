"""Times numbainfer and a peer alternately, so that the ratio holds on a machine whose speed drifts."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from numbainfer.bench import Feeder, bytes_moved
from numbainfer.config import ModelConfig
from numbainfer.device import Device
from numbainfer.model import Model
from numbainfer.random_weights import RANDOM, RandomWeights
from numbainfer.registry import bind

# On CPUs, both engines keep threads that poll for work for a while after their last call: time to fall asleep.
REST_SECONDS = 0.3


class Numbainfer:
    """Random int8 weights of a real shape, behind the calls that a peer offers too."""

    def __init__(self, architecture: str, context: int, device: Device, threads: int) -> None:
        self.ops = bind(device, threads)
        self.model = Model(self.ops, RandomWeights(architecture), context)
        feeder = Feeder(self.model)
        self.reset, self.prefill = feeder.reset, feeder.feed
        # One by one. The choice of the next token is part of it here, and is not part of a peer's.
        self.decode = feeder.generate


def arguments(description: str, devices: Sequence[str] = ("cpu",)) -> argparse.Namespace:
    """The options that every comparison takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--model", choices=RANDOM, default="llama-3.2-1b")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--gen-tokens", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens in the cache before the test")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    return parser.parse_args()


def config_of(architecture: str) -> ModelConfig:
    """The shape of a model that `bench --random` knows."""
    return ModelConfig.from_dict(RANDOM[architecture], architecture)


def compare(name: str, peer: Any, options: argparse.Namespace) -> None:
    """Runs both in turn and prints tokens per second, ratios and the share of the read bandwidth.

    peer: an object with reset(depth), prefill(count) and decode(count).
    """
    device = Device.parse(options.device)
    context = options.depth + max(options.prompt_tokens, options.gen_tokens)
    ours = Numbainfer(options.model, context, device, options.threads)
    probe = ours.ops.backend.BandwidthProbe(ours.ops.stream)
    rows = []
    for test, count in (("pp", options.prompt_tokens), ("tg", options.gen_tokens)):
        if count == 0:
            continue
        seconds: dict[str, list[float]] = {"numbainfer": [], name: []}
        ceilings = []
        for repetition in range(options.repetitions + 1):  # the first is a warm-up
            for engine_name, engine in (("numbainfer", ours), (name, peer)):
                engine.reset(options.depth)
                time.sleep(REST_SECONDS)
                taken = _timed(engine.prefill if test == "pp" else engine.decode, count)
                if repetition:
                    seconds[engine_name].append(taken)
            time.sleep(REST_SECONDS)
            ceilings.append(probe.measure())
        ratios = [b / a for a, b in zip(seconds["numbainfer"], seconds[name], strict=True)]
        taken = statistics.median(seconds["numbainfer"])
        moved = bytes_moved(ours.model, test, count, options.depth) / taken
        rows.append(
            {
                "model": options.model,
                "test": f"{test}{count}" + (f"@d{options.depth}" if options.depth else ""),
                "device": options.device,
                "threads": options.threads if options.device == "cpu" else None,
                "numbainfer": count / taken,
                name: count / statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "percent_of_ceiling": 100 * moved / statistics.median(ceilings) if test == "tg" else None,
                "ceiling_gb_s": statistics.median(ceilings) / 1e9,
                "device_name": ours.ops.backend.device_name(device),
            }
        )
    if options.output == "json":
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        share = f", {row['percent_of_ceiling']:.0f}% of the read bandwidth" if row["percent_of_ceiling"] else ""
        threads = f", {row['threads']} threads" if row["threads"] else ""
        print(
            f"{row['model']} {row['test']} ({row['device_name']}{threads}): numbainfer {row['numbainfer']:.1f} tok/s, "
            f"{name} {row[name]:.1f} tok/s, ratio {row['ratio']:.2f}{share}",
            flush=True,
        )


def _timed(call: Callable[[int], Any], count: int) -> float:
    start = time.perf_counter()
    call(count)
    return time.perf_counter() - start
