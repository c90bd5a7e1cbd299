"""What a policy is asked and answers, in the tokens of a judge that has another tokenizer.

Prompts are rendered anew from the rows, by the judge's own chat template: decoded tokens of the policy's template
would be plain text to it. Responses are decoded, and encoded behind these prompts as in the judge's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from discobeta.data.encode import encode
from discobeta.data.examples import Example
from discobeta.data.row_report import RowReport
from discobeta.data.sources import read_examples
from discobeta.data.templates import closing_id
from discobeta.design.config import RunConfig
from discobeta.errors import UserError
from discobeta.model.generation import has_ended


def is_needed(policy: Any, judge: Any) -> bool:
    """Whether the judge's tokenizer gives other ids; tokens that only it has are no difference."""
    return not policy.get_vocab().items() <= judge.get_vocab().items()


class Translation:
    """From the ids of one tokenizer to those of another."""

    def __init__(self, config: RunConfig, policy: Any, judge: Any, context: int, stops: list[int]):
        """context: tokens that the judge can read; stops: ids that end a response of the policy.

        Raises UserError for rows that are not there to be read, and for a prompt that the judge cannot be given.
        """
        self.policy, self.judge, self.context, self.stops = policy, judge, context, stops
        if not config.dataset:
            raise UserError(
                f"reward_model: {config.reward_model} has another tokenizer than {config.model_name_or_path}, so the "
                "prompts have to be read anew: name their dataset, tokenized_path holds the policy's tokens only"
            )
        self.examples: dict[bytes, Example] = {}
        self.prompts: dict[bytes, np.ndarray] = {}
        for names, split in ((config.dataset, config.split), (config.eval_dataset, config.eval_split)):
            if names:
                self._read(config, names, split)

    def _read(self, config: RunConfig, names: str, split: str) -> None:
        rows, report = read_examples(names, config, split=split, kind="prompts")
        self.add(rows, config, report, f"{names} for reward_model {config.reward_model}")

    def add(self, prompts: Sequence[Example], config: RunConfig, report: RowReport, name: str) -> None:
        """Learn what these prompts are to the judge. name: of them, in an error. Raises UserError as at the start."""
        examples = [replace(example, source=str(i)) for i, example in enumerate(prompts)]
        policy_rows = encode(examples, self.policy, config.cutoff_len, "prompts", report)
        asked = [examples[int(number)] for number in policy_rows.source]
        report = RowReport(name, len(asked))
        judge_rows = encode(asked, self.judge, self.context, "prompts", report)
        report.check(0.0)
        for ids, translated, example in zip(policy_rows.prompt_ids, judge_rows.prompt_ids, asked, strict=True):
            self.examples.setdefault(ids.tobytes(), example)
            self.prompts.setdefault(ids.tobytes(), translated)

    def __call__(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Prompts and responses in the judge's ids; one that was not ended has no end there either."""
        keys = [np.asarray(ids, np.int32).tobytes() for ids in prompts]
        ended = [has_ended(ids, self.stops) for ids in responses]
        texts = [
            self.policy.decode(ids[:-1] if end else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids, end in zip(responses, ended, strict=True)
        ]
        as_trained = self._as_trained(keys, texts)
        translated = []
        for i, (key, end) in enumerate(zip(keys, ended, strict=True)):
            ids, room = as_trained.get(i), self.context - len(self.prompts[key])
            if ids is None:  # an empty text, or one that the template does not leave as it is
                ids = [*self.judge(texts[i], add_special_tokens=False)["input_ids"], self._end()]
            if not end and len(ids) > 1 and ids[-1] in (self.judge.eos_token_id, self._end()):
                ids = ids[:-1]
            translated.append(np.asarray(ids[:room], np.int32))
        return [self.prompts[key] for key in keys], translated

    def _end(self) -> int:
        closing = closing_id(self.judge)
        return self.judge.eos_token_id if closing is None else closing

    def _as_trained(self, keys: list[bytes], texts: list[str]) -> dict[int, list[int]]:
        """Number -> ids, with their end, of those responses that are rows of the judge's training."""
        pairs = enumerate(zip(keys, texts, strict=True))
        examples = [replace(self.examples[key], chosen=text, source=str(i)) for i, (key, text) in pairs]
        try:
            rows = encode(examples, self.judge, self.context, "supervised", RowReport("responses", len(examples)))
        except UserError:  # of a template that refuses all of them
            return {}
        parts = zip(rows.source, rows.prompt_ids, rows.chosen_ids, strict=True)
        return {int(i): list(ids) for i, prompt, ids in parts if np.array_equal(prompt, self.prompts[keys[int(i)]])}
