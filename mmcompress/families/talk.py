"""How a question about pictures becomes tokens: the checkpoint's chat template, with the pictures' tokens in their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError

if TYPE_CHECKING:
    from mmcompress.data import Sample


# A template is a program: what Jinja raises itself, and what its expressions raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Shown:
    """A picture or a video, as a prompt has it."""

    token: str
    """What a chat template writes for it."""
    stands: str
    """What stands in its place: its token, as often as it has image tokens."""
    kind: Literal["image", "video"] = "image"
    around: tuple[str, str] = ("", "")
    """What a template may write before and after, and `stands` brings along."""


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

    def prompt(self, processor: Processor, sample: Sample, shown: Sequence[Shown], tokens: Sequence[str]) -> list[int]:
        """Return the tokens of all that is said before the answer; each of what is `shown` stands in the place of its token.

        All of it belongs to the first question. Raises UsageError where a text holds one of the `tokens` that stand for pictures,
        where the template fails, and where it has not as many places as there are pictures.
        """
        tokenizer = self.tokenizer(processor)
        questions = [question for question, _ in sample.turns] + [sample.question or self.without_question]
        answers = [answer for _, answer in sample.turns]
        require_no_tokens(sample, (*questions, *answers), tokens)
        text = self._written(tokenizer, questions, answers, shown)
        for token in tokens:
            found, wanted = text.count(token), sum(one.token == token for one in shown)
            if found != wanted:
                raise UsageError(
                    f"the chat template writes {found} image tokens ({token}) for sample '{sample.key}' with {wanted} "
                    f"picture{'s' * (wanted != 1)}",
                    hint="use the chat template that belongs to this checkpoint",
                )
        text = in_place(text, shown)
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not begins)["input_ids"]
        return ids

    def _written(self, tokenizer: Any, questions: list[str], answers: list[str], shown: Sequence[Shown]) -> str:
        if tokenizer.chat_template is None:
            if self.without_template is None:
                raise UsageError("this checkpoint has no chat template", hint="add its chat_template.jinja")
            turns = [
                self.without_template.format(
                    image="\n".join(one.token for one in shown) if first else "", question=question
                )
                for first, question in zip((True, *[False] * len(answers)), questions, strict=True)
            ]
            return turns[0] + "".join(
                f" {answer} {turn.lstrip()}" for answer, turn in zip(answers, turns[1:], strict=True)
            )
        messages: list[dict[str, Any]] = []
        for number, question in enumerate(questions):
            pictures = [{"type": one.kind} for one in shown] if not number else []
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
            if number < len(answers):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"the chat template of this checkpoint fails: {reason}",
                hint="use the chat template that belongs to this checkpoint; it is given lists of texts and images",
            ) from error
        if any(str(message["content"]) in text for message in messages):
            raise UsageError(
                "the chat template of this checkpoint takes plain texts, not lists of texts and images",
                hint="use the chat template that belongs to this checkpoint",
            )
        if questions[-1].strip() not in text:
            raise UsageError(
                "the chat template of this checkpoint leaves out the question",
                hint="use the chat template that belongs to this checkpoint",
            )
        return text


def require_no_tokens(sample: Sample, texts: Iterable[str], tokens: Sequence[str]) -> None:
    """Raise UsageError where a text holds what stands for a picture, for this checkpoint or in data written for others."""
    for text in texts:
        found = next((token for token in (*tokens, "<image>", "<video>") if token in text), None)
        if found:
            count, pictures = text.count(found), len(sample.pictures)
            raise UsageError(
                f"the text of sample '{sample.key}' holds {found}{f' {count} times' if count > 1 else ''}, which stands for a "
                f"picture; the sample has {pictures or 'none'}",
                hint="leave it out; pictures are put before the first question by themselves",
            )


def in_place(text: str, shown: Sequence[Shown]) -> str:
    """Return `text` with what stands for each picture in the place of its token; the n-th of a kind takes the n-th place."""
    for token in dict.fromkeys(one.token for one in shown):
        own = [one for one in shown if one.token == token]
        around = (f"(?:{re.escape(word)})?" if word else "" for word in own[0].around)
        before, after = around
        rest = iter(own)
        text = re.sub(f"{before}{re.escape(token)}{after}", lambda _, rest=rest: next(rest).stands, text)  # type: ignore[misc]
    return text
