"""Is the simulation right? Rates of real runs (`scripts/async_runs.py`) go in, with the lengths that were written; step
times come out, and are held against the measured ones.

* ``sync`` and ``split`` get the rates of their own runs: what may be wrong is that a step is the sum of its parts, and that a
  token costs a + b n seconds where n responses are written at once.
* ``async`` gets the rates of ``split``: same server, same trainer, never both at work. So it is a forecast: up to
  max_staleness + 1 times as many responses are written at once, by a server that shares the machine with a trainer at work.
* ``async_own_rates`` gets what the trainer's own parts took in the asynchronous runs; the server's rates remain those of
  ``split``. The difference between the two is what server and trainer take from each other.
"""

import statistics
from dataclasses import asdict, replace

import numpy as np

from scripts.async_model import Rates, Result, Rule, Split, Workload, synchronous
from scripts.async_runs import Measured, Setting
from scripts.async_simulation import asynchronous

SERVED = Split(rollout=1, teacher=0, trainer=1)  # the teacher is on the trainer's device


def fit_decode(longest_I: np.ndarray, tokens_I: np.ndarray, seconds_I: np.ndarray) -> tuple[float, float]:
    """(a, b) of a + b n seconds for a token of each of n running responses, n being what is left of a step's responses.

    Summed over a step that is a * longest + b * tokens, so it is a least-squares fit with two unknowns, neither below 0.

    Example: one response of 4 tokens in 6 s and two of 4 in 8 s: `fit_decode([4, 4], [4, 8], [6, 8])` = (1.0, 0.5).
    """
    columns_I2 = np.stack([longest_I, tokens_I], axis=1).astype(float)
    (a, b), *_ = np.linalg.lstsq(columns_I2, np.asarray(seconds_I, float), rcond=None)
    if b < 0:
        return float(np.sum(seconds_I) / np.sum(longest_I)), 0.0
    if a < 0:
        return 0.0, float(np.sum(seconds_I) / np.sum(tokens_I))
    return float(a), float(b)


def rates_of(runs: list[Measured], setting: Setting) -> Rates:
    """What the measured steps of the runs of a side say. What no phase covers, logging above all, counts as training."""
    window = setting.window
    lengths_IB = np.concatenate([run.lengths_IB[window] for run in runs])
    phases = {name: np.concatenate([run.phases[name][window] for run in runs]) for name in runs[0].phases}
    seconds_I, pause_I = (
        np.concatenate([getattr(run, name)[window] for run in runs]) for name in ("seconds_I", "pause_I")
    )
    written_I = lengths_IB.sum(axis=1)
    a, b = fit_decode(lengths_IB.max(axis=1), written_I, phases["rollout"])
    tokens = float((written_I + setting.prompts * setting.prompt_tokens).sum())
    pause = float(pause_I.mean())
    return Rates(
        decode_a=a, decode_b=b, max_batch=(setting.max_staleness + 1) * setting.prompts,
        score=float(phases["score"].sum()) / tokens,
        train=float((seconds_I - phases["rollout"] - phases["score"] - phases["sync"]).sum()) / tokens,
        publish=float(phases["sync"].mean()) - pause, load=pause,
    )  # fmt: skip


def by_the_trainer(rates: Rates) -> Rates:
    """The same where the trainer's device does the scoring, once all responses are there."""
    return replace(rates, train=rates.train + rates.score, score=0.0)


def step_seconds(result: Result, setting: Setting) -> float:
    """Mean seconds of the measured steps of a simulated run."""
    return float(np.diff(result.ended, prepend=0.0)[setting.window].mean())


def simulate(side: str, run: Measured, rates: Rates, setting: Setting) -> float:
    """Seconds of a step on the lengths of a real run."""
    work = Workload(run.lengths_IB.ravel(), setting.prompts, setting.steps, setting.prompt_tokens)
    if side == "sync":
        return step_seconds(synchronous(work, rates, 1), setting)
    if side == "split":
        return step_seconds(synchronous(work, by_the_trainer(rates), SERVED), setting)
    rule = Rule(setting.max_staleness, waves=1, trainer_waits=True)
    return step_seconds(asynchronous(work, by_the_trainer(rates), SERVED, rule), setting)


def check(runs: dict[str, list[Measured]], setting: Setting) -> dict:
    """Simulated seconds of a step over measured ones, minus 1, for each side; and the rates that went in."""
    sync, split, busy = (rates_of(runs[side], setting) for side in ("sync", "split", "async"))
    # The trainer of an asynchronous run waits for responses, but does not see them being written.
    busy = replace(busy, decode_a=split.decode_a, decode_b=split.decode_b)
    sides = {"sync": sync, "split": split, "async": split, "async_own_rates": busy}
    errors, seconds = {}, {}
    for name, rates in sides.items():
        side = name.removesuffix("_own_rates")
        pairs = [
            (simulate(side, run, rates, setting), float(run.seconds_I[setting.window].mean())) for run in runs[side]
        ]
        simulated, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
        seconds[name] = {"simulated_s": round(simulated, 3), "measured_s": round(measured, 3)}
        errors[f"simulation_error_{name}"] = round(simulated / measured - 1, 4)
    rounded = {
        name: {key: float(f"{value:.4g}") for key, value in asdict(rates).items() if key != "logprob"}
        for name, rates in (("sync", sync), ("split", split), ("async", busy))
    }
    return {**errors, "step_seconds": seconds, "measured_rates": rounded}
