"""The PyTorch side of `serve.py`: transformers' `generate` behind FastAPI, as one would write it.

    python benchmarks/serve_torch.py --model=FOLDER --port=9000 [--batch=8]

One request is answered at a time, with the key-value cache of `generate`, and streamed by
`TextIteratorStreamer`. With --batch, a loop takes all that wait, up to as many, as one padded batch
of `generate`, which streams nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import serve_model
import torch
import transformers
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from xllm_jax.data.text import templates


class Model:
    """Answers questions, one at a time or in batches.

    Args:
      folder: of the LLM and its tokenizer.
    """

    def __init__(self, folder: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.words = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        )  # fmt: skip
        self.network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        style = templates.template(serve_model.TEMPLATE)
        self.around = f"{style.system}{style.question}".replace("{media}", "")
        self.turn = threading.Lock()

    def ids(self, questions: list[str]) -> dict[str, torch.Tensor]:
        """What the network reads."""
        texts = [self.around.replace("{question}", one) for one in questions]
        found = self.words(texts, return_tensors="pt", padding=True)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def stream(self, question: str, count: int) -> Iterator[str]:
        """The pieces of an answer of so many tokens."""
        with self.turn:
            pieces = transformers.TextIteratorStreamer(self.words, skip_prompt=True)
            given = {"streamer": pieces, "max_new_tokens": count, "do_sample": False}
            work = threading.Thread(
                target=self.network.generate, kwargs=self.ids([question]) | given
            )
            work.start()
            yield from pieces
            work.join()

    def answers(self, questions: list[str], count: int) -> list[str]:
        """Whole answers of a padded batch."""
        ids = self.ids(questions)
        with torch.inference_mode():
            made = self.network.generate(**ids, max_new_tokens=count, do_sample=False)
        return self.words.batch_decode(made[:, ids["input_ids"].shape[1] :])


class Batches:
    """A loop that answers what waits together.

    Args:
      model: it.
      most: rows of a batch.
    """

    def __init__(self, model: Model, most: int):
        self.model, self.most = model, most
        self.waiting: queue.Queue[tuple[str, int, Future[str]]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, question: str, count: int) -> Future[str]:
        """Queues a question."""
        answer: Future[str] = Future()
        self.waiting.put((question, count, answer))
        return answer

    def _run(self) -> None:
        while True:
            group = [self.waiting.get()]
            while len(group) < self.most and not self.waiting.empty():
                group.append(self.waiting.get())
            texts = self.model.answers([one for one, _, _ in group], max(n for _, n, _ in group))
            for text, (_, _, answer) in zip(texts, group):
                answer.set_result(text)


def create(model: Model, batch: int = 0) -> FastAPI:
    """The application."""
    app = FastAPI()
    batches = Batches(model, batch) if batch else None

    @app.post("/v1/chat/completions")
    async def complete(incoming: Request) -> StreamingResponse:
        asked: dict[str, Any] = await incoming.json()
        question, count = asked["messages"][0]["content"], asked["max_tokens"]
        if batches:
            pieces = iter([await asyncio.wrap_future(batches.put(question, count))])
        else:
            pieces = model.stream(question, count)
        return StreamingResponse(map(event, pieces), media_type="text/event-stream")

    return app


def event(text: str) -> str:
    """A piece as OpenAI's API sends it."""
    return (
        f"data: {json.dumps({'choices': [{'delta': {'content': text}}]}, ensure_ascii=False)}\n\n"
    )


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=0)
    flags = parser.parse_args()
    app = create(Model(flags.model), flags.batch)
    uvicorn.run(app, host="127.0.0.1", port=flags.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
