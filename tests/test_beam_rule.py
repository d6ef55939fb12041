"""Beam search against an independent rewrite of the rule in transformers 4.27.1, case by case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.inference.decoding import Decoding, beam_search

CASES, STEPS, VOCAB, BEAMS, END, PAD = 110, 7, 23, 4, 5, 0
PENALTIES = (-1.5, -0.5, 0.0, 0.5, 1.0, 2.0)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log probabilities `[cases, steps, vocab]`, effect of each token, prompt lengths)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(CASES, STEPS, VOCAB)) * generator.uniform(0.3, 2, (CASES, 1, 1))
    logits[..., END] += generator.normal(1.5, 1.5, (CASES, 1))
    effect = generator.normal(size=(VOCAB, VOCAB))
    return logits.astype(np.float32), effect.astype(np.float32), generator.integers(1, 12, CASES)


class TableLLM:
    """An LLM whose logits follow from the row, the step and every token before, kept as a cache."""

    def __init__(self, logits: np.ndarray, effect: np.ndarray):
        self.logits, self.effect = jnp.asarray(logits), jnp.asarray(effect)

    def __call__(self, x, *given, method=None):
        if method == "embed":
            return x
        if method == "logits":
            return x
        segments, _, positions, cache = given
        step = positions[0, 0, 0]
        sums = cache["key"] + 0.0
        place = cache["length"][0]
        sums = sums.at[0, :, place].set(x[:, 0].astype(jnp.float32))
        history = sums[0].astype(jnp.int32)
        past = (jnp.arange(history.shape[1]) <= place)[None, :, None]
        moved = (self.effect[history] * past).sum(axis=1)
        row = jnp.maximum(segments[:, 0] - 1, 0)
        states = self.logits[row, step] + jnp.sin(moved)
        return states[:, None], {"key": sums, "value": sums, "length": cache["length"] + 1}

    def state(self, lengths: np.ndarray) -> dict:
        """What prefill would hand over; the cache holds no prompt."""
        rows = len(lengths)
        memory = jnp.zeros((1, rows, STEPS))
        return {
            "cache": {"key": memory, "value": memory, "length": jnp.zeros(rows, jnp.int32)},
            "logits": self.logits[:, 0],
            "position": jnp.zeros((rows, 1), jnp.int32),
            "segment": jnp.arange(1, rows + 1),
            "lengths": jnp.asarray(lengths),
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def searched(logits, effect, prompt, penalty, early, with_new_token=True):
    """The rule for one row: (finished hypotheses as (score, tokens), best first; steps taken)."""
    running, finished = [(0.0, [])], []
    for step in range(STEPS):
        found = []
        for total, tokens in running:
            moved = effect[tokens].sum(axis=0) if tokens else np.zeros(VOCAB)
            gains = log_softmax(logits[step] + (np.sin(moved) if tokens else 0))
            found += [(total + gain, [*tokens, token]) for token, gain in enumerate(gains)]
        found = sorted(found, key=lambda pair: -pair[0])[: 2 * BEAMS]
        running = []
        for rank, (total, tokens) in enumerate(found):
            if tokens[-1] != END:
                running.append((total, tokens))
            elif rank < BEAMS:
                finished.append((total / float(prompt + step) ** penalty, tokens))
                finished = sorted(finished, key=lambda pair: -pair[0])[:BEAMS]
            if len(running) == BEAMS:
                break
        length = float(prompt + step + with_new_token)
        full = len(finished) == BEAMS
        if full and (early or finished[-1][0] >= found[0][0] / length**penalty):
            return finished, step + 1
    length = float(prompt + STEPS)
    finished += [(total / length**penalty, tokens) for total, tokens in running]
    return sorted(finished, key=lambda pair: -pair[0])[:BEAMS], STEPS


@pytest.mark.parametrize("early", [False, True])
def test_every_case_ends_as_the_rule_says(early):
    """1,320 rows: penalties of both signs, early stopping on and off, prompts of many lengths."""
    changed = 0
    for number, penalty in enumerate(PENALTIES):
        logits, effect, lengths = draw(number)
        how = Decoding(
            (END,), PAD, (1,), STEPS, beams=BEAMS, length_penalty=penalty, early_stopping=early
        )
        llm = TableLLM(logits, effect)
        made = jax.jit(lambda lengths: beam_search(llm, llm.state(lengths), how, 0))(lengths)  # noqa: B023
        for row, length in enumerate(lengths):
            given = (logits[row], effect, length, penalty, early)
            expected, _ = searched(*given)
            changed += searched(*given, with_new_token=False)[0] != expected
            wanted = [[*tokens, *[PAD] * (STEPS - len(tokens))] for _, tokens in expected]
            where = f"penalty {penalty}, row {row}"
            assert made.tokens[row].tolist() == wanted, where
            scores = [score for score, _ in expected]
            np.testing.assert_allclose(made.scores[row], scores, rtol=2e-5, atol=1e-6)
    # The cases can tell the rule from one that forgets the new token, where there is a difference.
    assert changed == 0 if early else changed > 20
