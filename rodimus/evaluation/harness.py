"""Tasks of EleutherAI's lm-evaluation-harness, run by that library on a model of ours."""

import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, first_line


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    task_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Metrics by task, as the library reports them.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: The model's tokenizer.
        tasks: Names of tasks or groups that the library knows, and task patterns (``mmlu_*``).
        num_fewshot: Examples in the prompt; default as each task defines.
        limit: Questions of each task; default all. For trying things out only.
        batch_size: Questions in one forward pass.
        max_length: Tokens of prompt and answer; the library cuts longer prompts from the left.
            Default the ``max_position_embeddings`` of the model.
        task_folder: Folder of further task definitions (YAML).

    Raises:
        InputError: a task is unknown, its questions cannot be downloaded, or it asks for generated
            text and the model generates none, or none as long.
        ImportError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f'--tasks needs lm-evaluation-harness: pip install "lm_eval[hf]" ({error})'
        ) from error
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    tasks = _names(tasks, manager)
    if not model.can_generate():
        loaded = manager.load(tasks)["tasks"].items()
        generating = [name for name, task in loaded if task.OUTPUT_TYPE == "generate_until"]
        if generating:
            kind = type(model).__name__
            raise InputError(f"{', '.join(generating)} asks for generated text, {kind} has none")
    adapter = _marked_once(HFLM)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        # in bfloat16, sums of log-probabilities are whole nats, so that answers tie
        softmax_dtype="float32",
    )
    try:
        results = simple_evaluate(
            model=adapter,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except ConnectionError as error:
        raise InputError(f"a task's questions cannot be had: {first_line(error)}") from error
    except AssertionError as error:
        if "sequence length" not in str(error):
            raise
        raise InputError(f"{first_line(error).rstrip('.')}; --max-length N allows more") from error
    return results["results"]


def _marked_once(adapter: type) -> type:
    """The adapter, except that a text for perplexity gets only one begin mark: the library adds
    one, and the tokenizer's own would be a second one, which the model would have to predict."""

    class Adapter(adapter):
        def loglikelihood_rolling(self, *args, **options):
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*args, **options)
            finally:
                self.add_bos_token = before

    return Adapter


def _names(wanted: list[str], manager: Any) -> list[str]:
    """The tasks that names and patterns stand for, each once: the library loads only names."""
    known = set(manager.all_tasks)
    # patterns match tasks only, because the library does not take a group together with its tasks
    found = {w: [w] if w in known else fnmatch.filter(manager.all_subtasks, w) for w in wanted}
    unknown = [name for name in wanted if not found[name]]
    if unknown:
        raise InputError(f"lm-evaluation-harness has no task {', '.join(unknown)}")
    return list(dict.fromkeys(chain.from_iterable(found.values())))
