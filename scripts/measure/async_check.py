"""Is the simulation right? Rates of real runs (`scripts/measure/async_runs.py`) go in, with the
lengths that were written; step times come out, and are held against the measured ones.

* ``sync`` and ``split`` get the rates of their own run: what may be wrong is that a step is the sum
  of its parts, and that a
  token costs a + b n seconds where n responses are written at once.
* ``async`` gets the rates of ``split``: same server, same trainer, never both at work. So it is a
  forecast: up to
  max_staleness + 1 times as many responses are written at once, by a server that shares the machine
  with a trainer at work.
* ``async_own_rates`` gets what the trainer's own parts took in the asynchronous runs; the server's
  rates remain those of
  ``split``. The difference between the two is what server and trainer take from each other.
"""

import statistics
from dataclasses import asdict, replace

import numpy as np

from scripts.measure.async_model import Rates, Result, Rule, Split, Workload, synchronous
from scripts.measure.async_runs import Measured, Setting
from scripts.measure.async_simulation import asynchronous

SERVED = Split(rollout=1, teacher=0, trainer=1)  # the teacher is on the trainer's device


def fit_decode(
    longest_I: np.ndarray, tokens_I: np.ndarray, seconds_I: np.ndarray
) -> tuple[float, float]:
    """(a, b) of a + b n seconds for a token of each of n running responses, n being what is left of
    a step's responses.

    Summed over a step that is a * longest + b * tokens, so it is a least-squares fit with two
    unknowns, neither below 0.

    Example: one response of 4 tokens in 6 s and two of 4 in 8 s: `fit_decode([4, 4], [4, 8], [6,
    8])` = (1.0, 0.5).
    """
    columns_I2 = np.stack([longest_I, tokens_I], axis=1).astype(float)
    (a, b), *_ = np.linalg.lstsq(columns_I2, np.asarray(seconds_I, float), rcond=None)
    if b < 0:
        return float(np.sum(seconds_I) / np.sum(longest_I)), 0.0
    if a < 0:
        return 0.0, float(np.sum(seconds_I) / np.sum(tokens_I))
    return float(a), float(b)


def rates_of(run: Measured, setting: Setting) -> Rates:
    """What the measured steps of a run say.

    What no phase covers, logging above all, counts as training.
    """
    window = setting.window
    written_I, longest_I = run.lengths_IB[window].sum(axis=1), run.lengths_IB[window].max(axis=1)
    rollout_I, score_I, sync_I = (run.phases[name][window] for name in ("rollout", "score", "sync"))
    a, b = fit_decode(longest_I, written_I, rollout_I)
    tokens = float((written_I + setting.prompts * setting.prompt_tokens).sum())
    pause = float(run.pause_I[window].mean())
    return Rates(
        decode_a=a,
        decode_b=b,
        max_batch=(setting.max_staleness + 1) * setting.prompts,
        score=float(score_I.sum()) / tokens,
        train=float((run.seconds_I[window] - rollout_I - score_I - sync_I).sum()) / tokens,
        publish=float(sync_I.mean()) - pause,
        load=pause,
    )


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


def rates_of_round(runs: dict[str, Measured], setting: Setting) -> dict[str, Rates]:
    """What each line of the check gets, from the runs of one round: other rounds saw another load
    of the machine.
    """
    sync, split, busy = (rates_of(runs[side], setting) for side in ("sync", "split", "async"))
    # The trainer of an asynchronous run waits for responses, but does not see them being written.
    own = replace(busy, decode_a=split.decode_a, decode_b=split.decode_b)
    return {"sync": sync, "split": split, "async": split, "async_own_rates": own}


def check(runs: dict[str, list[Measured]], setting: Setting) -> dict:
    """Simulated seconds of a step over measured ones, minus 1, for each side: the median over
    rounds. And all rates.
    """
    turns = [dict(zip(runs, turn, strict=True)) for turn in zip(*runs.values(), strict=True)]
    rates = [rates_of_round(turn, setting) for turn in turns]
    errors, seconds = {}, {}
    for name in rates[0]:
        side = name.removesuffix("_own_rates")
        simulated = [
            simulate(side, turn[side], own[name], setting)
            for turn, own in zip(turns, rates, strict=True)
        ]
        measured = [float(turn[side].seconds_I[setting.window].mean()) for turn in turns]
        ratios = [ours / theirs for ours, theirs in zip(simulated, measured, strict=True)]
        errors[f"simulation_error_{name}"] = round(statistics.median(ratios) - 1, 4)
        seconds[name] = {
            "simulated_s": [round(s, 3) for s in simulated],
            "measured_s": [round(s, 3) for s in measured],
        }
    shown = [
        {name: rounded(own[name]) for name in ("sync", "split", "async_own_rates")} for own in rates
    ]
    return {**errors, "step_seconds": seconds, "measured_rates": shown}


def rounded(rates: Rates) -> dict[str, float]:
    """To be printed."""
    return {key: float(f"{value:.4g}") for key, value in asdict(rates).items()}
