"""Noise schedules and the ways through them: PNDM, DDIM, Euler, DPM-Solver++ (2M).

Each way is linear in the latents and in what the network gave, so that a table of numbers is all
that differs between them: computed here on the host in float64, given to `sampling.draw` in
float32. With a the share of the picture and 1 - a that of noise (`alphas`), e the noise and p the
picture that the network's output stands for:

    PNDM            arXiv 2202.09778, its multistep part alone (skip_prk_steps)
    DDIM            arXiv 2010.02502, eta 0
    Euler           arXiv 2206.00364, algorithm 1 without churn
    DPM-Solver++    arXiv 2211.01095, 2M: midpoint, the last step of first order

`scheduler_config.parse` makes one from a published file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from xllm_jax.core.errors import UserError

EPSILON, VELOCITY = "epsilon", "v_prediction"
RHO = 7.0  # of Karras' distances between noise levels (arXiv 2206.00364, equation 5)


class Calls(NamedTuple):
    """One row for each call of the network, `[calls]` float32 unless said otherwise.

    With x the latents, o the output and k = `kept_sample` x + `kept_output` o, bounded by the
    table's limit, the next latents are `sample` x + `output` o + `now` k + `past` · (earlier k).

    Attributes:
      time: what the network is told; Euler's may lie between two steps.
      scale: factor of x before the network.
      kept_sample, kept_output, sample, output, now: as above.
      past: `[calls, 3]`, of the latest k first.
      restart: bool, x is what the way began with.
      store: bool, k joins the earlier ones.
    """

    time: np.ndarray
    scale: np.ndarray
    kept_sample: np.ndarray
    kept_output: np.ndarray
    sample: np.ndarray
    output: np.ndarray
    now: np.ndarray
    past: np.ndarray
    restart: np.ndarray
    store: np.ndarray


class Table(NamedTuple):
    """A way of some steps.

    Attributes:
      start: factor of unit noise at the beginning, `[]` float32.
      limit: bound of k, `[]` float32; infinite where there is none.
      calls: rows.
    """

    start: np.ndarray
    limit: np.ndarray
    calls: Calls


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A noise schedule; a subclass says how to go through it.

    Attributes:
      train_steps: of the schedule.
      beta_start, beta_end: noise that the first and the last step add.
      beta_schedule: 'linear', or 'scaled_linear' (linear in the square roots).
      prediction: what the network gives, 'epsilon' or 'v_prediction'.
      spacing: which steps are taken, 'leading', 'linspace' or 'trailing'.
      steps_offset: added to 'leading' steps.
    """

    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction: str = EPSILON
    spacing: str = "leading"
    steps_offset: int = 0

    ONLY: ClassVar[Mapping[str, Any]] = {}
    """Options of the published class, and the one value of each that is computed here."""
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Of the published class, where another one has others."""

    def betas(self) -> np.ndarray:
        """Noise that each step adds, `[train_steps]` float64."""
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        first, last = (beta ** (1 / power) for beta in (self.beta_start, self.beta_end))
        return np.linspace(first, last, self.train_steps) ** power

    def alphas(self) -> np.ndarray:
        """The share of the picture in the variance after each step, `[train_steps]` float64."""
        return np.cumprod(1 - self.betas())

    def times(self, steps: int) -> np.ndarray:
        """Steps of the schedule that are taken, the noisiest first: `[steps]` float64.

        Raises:
          UserError: more of them than the schedule has, or none.
        """
        raise NotImplementedError

    def table(self, steps: int) -> Table:
        """The way of `steps` steps.

        Raises:
          UserError: as of `times`.
        """
        raise NotImplementedError

    def _checked(self, times: np.ndarray, steps: int) -> np.ndarray:
        if times.max() > self.train_steps - 1:
            raise _steps_error(steps, f"reach step {times.max():.0f} of {self.train_steps}")
        return times

    def _spaced(self, steps: int, linspace: int = 0, leading: int = 0) -> np.ndarray:
        """Steps from the noisiest; of 'linspace' and 'leading' so many more, which are cut off."""
        if not 0 < steps + leading <= self.train_steps:
            raise _steps_error(steps, f"do not fit into {self.train_steps}")
        last = self.train_steps - 1
        if self.spacing == "trailing":
            stride = self.train_steps / steps
            return np.arange(self.train_steps, 0, -stride)[:steps].round() - 1
        if self.spacing == "linspace":
            return np.linspace(0, last, steps + linspace)[::-1][:steps]
        stride = self.train_steps // (steps + leading)
        found = (np.arange(steps + leading) * stride)[::-1][:steps] + self.steps_offset
        return self._checked(found.astype(np.float64), steps)


@dataclasses.dataclass(frozen=True)
class Pndm(Scheduler):
    """PNDM's multistep part: one call more than steps, the second step of them taken twice.

    Attributes:
      set_alpha_to_one: no noise is left behind the last step, and not as much as at step 0.
    """

    set_alpha_to_one: bool = False

    ONLY: ClassVar = dict(skip_prk_steps=True)
    DEFAULTS: ClassVar = dict(skip_prk_steps=False)
    WEIGHTS: ClassVar = (
        (1, 0, 0, 0),
        (1 / 2, 1 / 2, 0, 0),
        (3 / 2, -1 / 2, 0, 0),
        (23 / 12, -16 / 12, 5 / 12, 0),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )
    """Of this output and the three before it; the second row begins the second step again."""

    def times(self, steps: int) -> np.ndarray:
        """As of `Scheduler`, and once more the second: `[steps + 1]`, of one step `[1]`."""
        found = self._spaced(steps).round()
        return np.concatenate([found[:2], found[1:]])

    def table(self, steps: int) -> Table:
        """The way of `steps` steps."""
        times, stride = self.times(steps).astype(int), self.train_steps // steps
        again = np.arange(len(times)) == 1
        before = np.where(again, times + stride, times)
        after = before - stride
        alphas = self.alphas()
        now, then = alphas[self._checked(before, steps)], _alphas_at(self, after)
        bottom = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)
        sample, mixed = np.sqrt(then / now), -(then - now) / bottom
        if self.prediction == VELOCITY:
            sample, mixed = sample + mixed * np.sqrt(1 - now), mixed * np.sqrt(now)
        rows = np.minimum(np.arange(len(times)), len(self.WEIGHTS) - 1)
        weights = mixed[:, None] * np.array(self.WEIGHTS)[rows]
        return _table(
            times,
            kept_output=1.0,
            sample=sample,
            now=weights[:, 0],
            past=weights[:, 1:],
            restart=again,
            store=~again,
        )


@dataclasses.dataclass(frozen=True)
class Ddim(Scheduler):
    """DDIM without noise on the way.

    Attributes:
      set_alpha_to_one: as of `Pndm`.
      clip_range: bound of the picture; infinite where there is none.
    """

    set_alpha_to_one: bool = True
    clip_range: float = np.inf

    ONLY: ClassVar = dict(thresholding=False, rescale_betas_zero_snr=False)
    DEFAULTS: ClassVar = dict(set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.0)

    def times(self, steps: int) -> np.ndarray:
        """As of `Scheduler`."""
        return self._spaced(steps).round()

    def table(self, steps: int) -> Table:
        """The way of `steps` steps."""
        times = self.times(steps).astype(int)
        now, then = self.alphas()[times], _alphas_at(self, times - self.train_steps // steps)
        picture, noise = _meaning(self.prediction, now)
        return _table(
            times,
            limit=self.clip_range,
            kept_sample=picture[0],
            kept_output=picture[1],
            sample=np.sqrt(1 - then) * noise[0],
            output=np.sqrt(1 - then) * noise[1],
            now=np.sqrt(then),
        )


@dataclasses.dataclass(frozen=True)
class Euler(Scheduler):
    """Euler's method over noise levels: x is the picture plus s times unit noise."""

    spacing: str = "linspace"

    ONLY: ClassVar = dict(
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        interpolation_type="linear",
        timestep_type="discrete",
        final_sigmas_type="zero",
        rescale_betas_zero_snr=False,
        sigma_min=None,
        sigma_max=None,
    )
    DEFAULTS: ClassVar = dict(timestep_spacing="linspace")

    def times(self, steps: int) -> np.ndarray:
        """As of `Scheduler`; 'linspace' gives fractions."""
        return self._spaced(steps)

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels, `[steps + 1]` float64, the last 0."""
        return _levels(self.alphas(), self.times(steps))

    def table(self, steps: int) -> Table:
        """The way of `steps` steps."""
        levels = self.sigmas(steps)
        here, stride, most = levels[:-1], np.diff(levels), levels.max()
        shrunk = 1 / np.sqrt(here**2 + 1)  # what the network sees has a variance of 1
        # The slope is e: the output itself, or what x and v say of it.
        sample = here * shrunk**2 if self.prediction == VELOCITY else np.zeros_like(here)
        output = shrunk if self.prediction == VELOCITY else np.ones_like(here)
        return _table(
            self.times(steps),
            start=np.sqrt(most**2 + 1) if self.spacing == "leading" else most,
            scale=shrunk,
            sample=1 + stride * sample,
            output=stride * output,
        )


@dataclasses.dataclass(frozen=True)
class DpmSolver(Scheduler):
    """DPM-Solver++ of second order, from this picture and the one before.

    Attributes:
      karras: noise levels at Karras' distances.
    """

    spacing: str = "linspace"
    karras: bool = False

    ONLY: ClassVar = dict(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        thresholding=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
        lambda_min_clipped=-np.inf,
        variance_type=None,
        rescale_betas_zero_snr=False,
    )
    DEFAULTS: ClassVar = dict(timestep_spacing="linspace", use_karras_sigmas=False)

    def times(self, steps: int) -> np.ndarray:
        """As of `Scheduler`."""
        if not self.karras:
            return self._spaced(steps, linspace=1, leading=1).round()
        alphas = self.alphas()
        known = np.log(_noise_levels(alphas))
        return np.interp(np.log(self.sigmas(steps)[:-1]), known, np.arange(len(known))).round()

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels, `[steps + 1]` float64, the last 0."""
        alphas = self.alphas()
        if not self.karras:
            return _levels(alphas, self.times(steps))
        self._spaced(steps)
        least, *_, most = _noise_levels(alphas) ** (1 / RHO)
        return np.append(np.linspace(most, least, steps) ** RHO, 0.0)

    def table(self, steps: int) -> Table:
        """The way of `steps` steps."""
        levels = self.sigmas(steps)
        here, then = levels[:-1], levels[1:]
        picture, _ = _meaning(self.prediction, 1 / (here**2 + 1))
        towards = (1 - then / here) / np.sqrt(then**2 + 1)
        sizes = np.full(steps, np.inf)  # h of every step: how far the log of the noise level falls
        sizes[:-1] = np.log(here[:-1] / then[:-1])
        extra = np.zeros(steps)  # of the difference from the picture before
        extra[1:-1] = towards[1:-1] / 2 * sizes[1:-1] / sizes[:-2]
        return _table(
            self.times(steps),
            kept_sample=picture[0],
            kept_output=picture[1],
            sample=then / here * np.sqrt((here**2 + 1) / (then**2 + 1)),
            now=towards + extra,
            past=np.stack([-extra, 0 * extra, 0 * extra], axis=1),
        )


def _steps_error(steps: int, what: str) -> UserError:
    hint = "Take fewer steps (50 are usual, 20 for dpmpp_2m), at least 1"
    return UserError(f"{steps} steps {what}", field="--steps", hint=hint)


def _alphas_at(scheduler: Pndm | Ddim, times: np.ndarray) -> np.ndarray:
    """`alphas` at times, of which those before the first step have the end's."""
    alphas = scheduler.alphas()
    end = 1.0 if scheduler.set_alpha_to_one else alphas[0]
    return np.where(times < 0, end, alphas[np.maximum(times, 0)])


def _noise_levels(alphas: np.ndarray) -> np.ndarray:
    return np.sqrt((1 - alphas) / alphas)


def _levels(alphas: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Noise levels at times, `[steps + 1]` with a 0 behind them."""
    return np.append(np.interp(times, np.arange(len(alphas)), _noise_levels(alphas)), 0.0)


def _meaning(prediction: str, alphas: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """((factor of x, of the output) of the picture, the same of the noise)."""
    signal, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
    if prediction == VELOCITY:
        return (signal, -noise), (noise, signal)
    return (1 / signal, -noise / signal), (np.zeros_like(signal), np.ones_like(signal))


def _table(
    times: np.ndarray,
    start: np.ndarray | float = 1.0,
    limit: float = np.inf,
    **columns: np.ndarray | float | bool,
) -> Table:
    """A table in float32; columns that are left out do nothing."""
    calls = len(times)
    neutral = dict.fromkeys(Calls._fields, 0.0) | dict(scale=1.0, restart=False, store=True)
    neutral |= dict(past=np.zeros((calls, 3)), time=times)
    made = {}
    for name, value in (neutral | columns).items():
        dtype = bool if name in ("restart", "store") else np.float32
        shape = (calls, 3) if name == "past" else (calls,)
        made[name] = np.broadcast_to(np.asarray(value, dtype), shape).copy()
    return Table(np.asarray(start, np.float32), np.asarray(limit, np.float32), Calls(**made))


_SCHEDULE: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)
SIZES: dict[str, dict[str, Any]] = {
    # Noise schedules as published with runwayml/stable-diffusion-v1-5, and with
    # stabilityai/stable-diffusion-2-1.
    "stable_diffusion_1_5": _SCHEDULE,
    "stable_diffusion_2_1": _SCHEDULE | dict(prediction=VELOCITY),
}
