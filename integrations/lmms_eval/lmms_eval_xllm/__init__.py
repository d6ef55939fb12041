"""X-LLM as a model of lmms-eval, over its OpenAI-compatible server.

    pip install ./integrations/lmms_eval
    python -m lmms_eval --model xllm --model_args base_url=http://localhost:8000/v1 --tasks TASK

lmms-eval's own `openai` model sends clips as single frames; this one sends files whole, so that the
server samples frames and hears sound as in training.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="xllm", chat_class_path="lmms_eval_xllm.model.XLLM")
