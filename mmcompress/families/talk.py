"""How a question about a picture becomes tokens: the checkpoint's chat template, with the picture's tokens in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError

if TYPE_CHECKING:
    from mmcompress.data import Sample


@dataclass(frozen=True)
class Talk:
    """The words around a question."""

    without_question: str = "Describe the image."
    """What is asked where a sample has no question."""
    without_template: str | None = "USER: {image}\n{question} ASSISTANT:"
    """How a turn is written where the checkpoint has no chat template; None: such checkpoints are refused."""

    def tokenizer(self, processor: Processor) -> Any:
        """Return the tokenizer. Raises UsageError where there is none."""
        if processor.tokenizer is None:
            raise UsageError("this checkpoint has no tokenizer", hint="add its tokenizer.json")
        return processor.tokenizer

    def prompt(self, processor: Processor, sample: Sample, token: str, stands: str) -> list[int]:
        """Return the tokens of all that is said before the answer; `stands` takes the place of the image `token`.

        The picture belongs to the first question. Raises UsageError where a text holds the image token itself, or the template
        has no place for the picture.
        """
        tokenizer = self.tokenizer(processor)
        questions = [question for question, _ in sample.turns] + [sample.question or self.without_question]
        answers = [answer for _, answer in sample.turns]
        for text in (*questions, *answers):
            if token in text:
                raise UsageError(
                    f"the text of sample '{sample.key}' holds {token}, which stands for a picture",
                    hint="leave it out; the picture is put before the first question",
                )
        text = self._written(tokenizer, questions, answers, token if sample.picture is not None else "")
        found = text.count(token)
        if found != (sample.picture is not None):
            raise UsageError(
                f"the chat template writes {found} image tokens ({token}) for sample '{sample.key}' with "
                f"{int(sample.picture is not None)} picture",
                hint="use the chat template that belongs to this checkpoint",
            )
        text = text.replace(token, stands)
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not begins)["input_ids"]
        return ids

    def _written(self, tokenizer: Any, questions: list[str], answers: list[str], token: str) -> str:
        if tokenizer.chat_template is None:
            if self.without_template is None:
                raise UsageError("this checkpoint has no chat template", hint="add its chat_template.jinja")
            turns = [
                self.without_template.format(image=token if first else "", question=question)
                for first, question in zip((True, *[False] * len(answers)), questions, strict=True)
            ]
            return turns[0] + "".join(
                f" {answer} {turn.lstrip()}" for answer, turn in zip(answers, turns[1:], strict=True)
            )
        messages: list[dict[str, Any]] = []
        for number, question in enumerate(questions):
            picture = [{"type": "image"}] if token and not number else []
            messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
            if number < len(answers):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
