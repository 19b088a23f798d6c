"""GREEN-style judges of radiology reports: a language model counts matched findings and errors, rules read its reply.

GREEN (arXiv:2405.03595) = matched findings / (matched findings + clinically significant errors of six kinds); insignificant
errors do not count. NOT A MEDICAL DEVICE: a judge's count is one model's opinion of another's text.

Departures from the authors' released reader: a reply that is not of the asked form has no score and a reason, where theirs scores
it 0 and so makes it a rejected answer; "Nodule ..." does not read as "No"; numbers are taken only where the form puts them, never
from prose; of a section every lettered line counts, also behind an empty line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mmalign.branches import BranchRecord, Judgement
from mmalign.errors import RewardError
from mmalign.rewards.answers import JudgeRequest, Loads, reference_text
from mmalign.rewards.chat import LocalChat, endpoint
from mmalign.rewards.replies import Chat, Reply, ReplyStore, ask_all

ERROR_KINDS: Final = (
    "false_finding", "missing_finding", "wrong_location", "wrong_severity", "invented_comparison", "omitted_comparison",
)  # fmt: skip
"""GREEN's kinds (a) to (f), in its order."""
REASONS: Final = (
    "no_reference", "empty_answer", "cut_reply", "no_sections", "repeated_section", "order", "unclear_errors", "unclear_matches",
)  # fmt: skip
"""Why a report has no score; replies that never came have the endpoint's reason (``http_400``, ``too_long``, ...)."""
MOST: Final = 99
"""No report has more findings; a larger number is a slip."""
TEMPLATE: Final = """You compare a candidate report on a chest radiograph with the reference report of the same study.

Reference report:
{reference}

Candidate report:
{candidate}

Count the findings on which both agree, and the errors of the candidate. An error is clinically significant if it could change
what is done for the patient. Kinds of error:
(a) a finding that the reference does not have
(b) a finding of the reference that the candidate lacks
(c) a wrong place or side of a finding
(d) a wrong severity of a finding
(e) a comparison with an earlier study that the reference does not make
(f) a comparison of the reference that the candidate lacks

Reply in exactly this form, one line for each kind, with whole numbers, and nothing behind it:

[Explanation]:
<one or two sentences>

[Clinically Significant Errors]:
(a) False finding: <number>. <the errors, separated by semicolons>
(b) Missing finding: <number>. <...>
(c) Wrong location: <number>. <...>
(d) Wrong severity: <number>. <...>
(e) Invented comparison: <number>. <...>
(f) Omitted comparison: <number>. <...>

[Clinically Insignificant Errors]:
<the same six lines>

[Matched Findings]:
<number>. <the findings, separated by semicolons>
"""

_NAMES = "explanation|clinically significant errors|clinically insignificant errors|matched findings"
_HEAD = re.compile(
    rf"^[ \t#]*\[?({_NAMES})\]?[ \t]*:?[ \t]*(?=\n|$)|^[ \t#]*\[({_NAMES})\][ \t]*:?", re.IGNORECASE | re.MULTILINE
)
_SIGNIFICANT, _INSIGNIFICANT, _MATCHED = "clinically significant errors", "clinically insignificant errors", "matched findings"
_ITEM = re.compile(r"^[ \t]*[-•]?[ \t]*\((?P<kind>[a-f1-6])\)(?P<rest>.*)$", re.MULTILINE | re.IGNORECASE)
_COUNT = re.compile(r"^[^:\n]*:[ \t]*(?P<count>[0-9]+)[ \t]*\.(?![0-9])[ \t]*(?P<words>.*)$")
_MATCHES = re.compile(r"^(?P<count>[0-9]+)[ \t]*\.(?![0-9])[ \t]*(?P<words>.*)$")
_NOTHING = re.compile(
    r"(?:there (?:are|were) )?(?:no|none|nil|n/a)(?: (?:clinically|significant|insignificant|errors?|match(?:ed|ing|es)?|"
    r"findings?|found|identified|present|noted|detected|were|was|are|is|in|the|candidate|report|of|any|type|kind))*[ \t]*\.?",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenCounts:
    """What a judge counted. `errors` and `insignificant` are in the order of ``ERROR_KINDS``; `notes` are its errors in words."""

    matched: int
    errors: tuple[int, ...]
    insignificant: tuple[int, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """matched / (matched + errors), in [0, 1]; 0 where nothing matches, as in the released code."""
        return self.matched / (self.matched + sum(self.errors)) if self.matched else 0.0


class UnreadableReplyError(Exception):
    """A reply that is not of the asked form; `reason` is one of ``REASONS``."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def parse_green(reply: str) -> GreenCounts:
    """Read a judge's reply strictly.

    Read: the sections of ``TEMPLATE`` in their order, with or without bold marks; errors as lines ``(a) ...: 2. words`` (or
    ``(1)`` to ``(6)`` where no letter stands), kinds that are not listed counting 0, or one phrase like "No errors."; matches
    as ``3. words`` or one such phrase. What stands in front of the first section or behind the last number is not looked at,
    nor is a leading ``<think>`` block. The section of insignificant errors may be missing or unclear: it does not enter the
    score.

    Raises:
        UnreadableReplyError: anything else.
    """
    text = _THOUGHT.sub("", reply.replace("\r\n", "\n")).replace("*", "").replace("`", "")
    if "<think>" in text:
        raise UnreadableReplyError("cut_reply", "it ends inside its thoughts")
    sections = _sections(text)
    for name in (_SIGNIFICANT, _MATCHED):
        if name not in sections:
            raise UnreadableReplyError("no_sections", f"there is no section '{name}'")
    if list(sections)[-1] != _MATCHED:
        raise UnreadableReplyError("order", f"'{_MATCHED}' is not the last section, so it may be incomplete")
    errors, notes = _errors(sections[_SIGNIFICANT])
    try:
        insignificant = _errors(sections[_INSIGNIFICANT])[0] if _INSIGNIFICANT in sections else None
    except UnreadableReplyError:
        insignificant = None
    return GreenCounts(matched=_matches(sections[_MATCHED]), errors=errors, insignificant=insignificant, notes=notes)


def _sections(text: str) -> dict[str, str]:
    heads = list(_HEAD.finditer(text))
    found: dict[str, str] = {}
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=False):  # without heads there is one end
        name = (head[1] or head[2]).lower()
        if name in found:
            raise UnreadableReplyError("repeated_section", f"'{name}' stands there twice")
        found[name] = text[head.end() : end].strip()
    return found


def _errors(body: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Counts of the six kinds, and the errors in words."""
    counts, notes = [0] * len(ERROR_KINDS), []
    items = list(_ITEM.finditer(body))
    letters = [item for item in items if item["kind"].isalpha()]
    items = letters or items
    if not items:
        if _NOTHING.fullmatch(body.partition("\n\n")[0].strip()):
            return tuple(counts), ()
        raise UnreadableReplyError("unclear_errors", f"no line '(a) ...: number.' and no 'No errors.': {body[:80]!r}")
    if body[: items[0].start()].strip():
        raise UnreadableReplyError("unclear_errors", f"words in front of the first kind: {body[:80]!r}")
    seen = set()
    for item in items:
        mark = item["kind"].lower()
        kind = "abcdef".index(mark) if mark.isalpha() else int(mark) - 1
        found = _COUNT.match(item["rest"])
        count = -1 if found is None else int(found["count"])
        words = "" if found is None else found["words"].strip()
        if found is None and _NOTHING.fullmatch(item["rest"].partition(":")[2].strip()):
            count = 0
        if kind in seen or not 0 <= count <= MOST:
            raise UnreadableReplyError("unclear_errors", f"no single clear number: {item[0].strip()[:80]!r}")
        seen.add(kind)
        counts[kind] = count
        if count:
            notes.append(f"{ERROR_KINDS[kind].replace('_', ' ')}: {words or count}")
    return tuple(counts), tuple(notes)


def _matches(body: str) -> int:
    first = body.partition("\n")[0].strip()
    found = _MATCHES.match(first)
    if found is not None and int(found["count"]) <= MOST:
        return int(found["count"])
    if _NOTHING.fullmatch(first):
        return 0
    raise UnreadableReplyError("unclear_matches", f"no number with a full stop in front: {first[:80]!r}")


def clean(text: str, max_words: int | None) -> str:
    """A report as the judge sees it: lower case, without bracketed spans and bold marks, blanks collapsed, cut to so many
    words."""
    words = re.sub(r"\[[^\]]*\]", " ", text.lower().replace("**", " ")).split()
    return " ".join(words if max_words is None else words[:max_words])


class GreenJudge:
    """A GREEN-style judge of answers; see the module's head.

    Args:
        chat: who counts.
        store: where replies are kept.
        template: with ``{reference}`` and ``{candidate}`` once each; fine-tuned judges want the words they were trained on.
        max_words: of each report that the judge sees, as the released code cuts; None: all. What a long report says beyond is
            not judged, so look at the lengths.
        max_tokens: most tokens of a reply.
    """

    def __init__(
        self, chat: Chat, store: ReplyStore, *, template: str = TEMPLATE, max_words: int | None = 300, max_tokens: int = 1024
    ) -> None:
        for place in ("{reference}", "{candidate}"):
            if template.count(place) != 1:
                raise RewardError(f"a judge's template needs {place} exactly once")
        self.chat, self.store, self.template, self.max_words, self.max_tokens = chat, store, template, max_words, max_tokens

    @classmethod
    def local(cls, argument: str, request: JudgeRequest) -> GreenJudge:
        """``green:<folder or hub id>``. Options: those of the class, ``template`` as a file, ``batch_size``, ``device``,
        ``dtype``."""
        options = request.take(template="", max_words=300, max_tokens=1024, batch_size=8, device=None, dtype=None)
        if not argument:
            raise RewardError("name the judge's model: green:<folder or hub id>")
        network = {name: options.pop(name) for name in ("batch_size", "device", "dtype")}
        return cls(LocalChat(argument, **network), ReplyStore(request.replies), **_read_template(options))

    @classmethod
    def remote(cls, argument: str, request: JudgeRequest) -> GreenJudge:
        """``green-api:http://host:port/v1#model``. Options: those of the class, ``template`` as a file, ``timeout``, ``retries``,
        ``concurrency``, ``key_env``."""
        options = request.take(template="", max_words=300, max_tokens=1024, timeout=120.0, retries=6, concurrency=8,
                               key_env="MMALIGN_JUDGE_KEY")  # fmt: skip
        network = {name: options.pop(name) for name in ("timeout", "retries", "concurrency", "key_env")}
        return cls(endpoint(argument, **network), ReplyStore(request.replies), **_read_template(options))

    def record(self) -> Mapping[str, Any]:
        """What decides the scores, for provenance."""
        return {**self.chat.identity(), "template": self.template, "max_words": self.max_words, "max_tokens": self.max_tokens}

    def score(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[float | None]:
        """See ``answers.AnswerJudge``."""
        return [found.score for found in self.judge(records, answers)]

    def judge(self, records: Sequence[BranchRecord], answers: Sequence[str]) -> list[Judgement]:
        """Scores with counts, errors in words and reasons; parts are ``matched``, the kinds of error and ``insignificant``.

        Raises:
            RewardError: the model could not be asked about all of them; what was answered is kept.
        """
        references = [reference_text(record) for record in records]
        asked = [at for at, reference in enumerate(references) if reference is not None and answers[at].strip()]
        prompts = [self._prompt(str(references[at]), answers[at]) for at in asked]
        replies = ask_all(self.chat, prompts, self.store, max_tokens=self.max_tokens)
        found = [
            Judgement(score=None, reason="no_reference" if reference is None else "empty_answer") for reference in references
        ]
        for at, reply in zip(asked, replies, strict=True):
            found[at] = _judgement(reply)
        return found

    def _prompt(self, reference: str, candidate: str) -> str:
        # Not str.format, and in one pass: reports may hold braces, or the other placeholder.
        parts = {"{reference}": clean(reference, self.max_words), "{candidate}": clean(candidate, self.max_words)}
        return re.sub(r"\{reference\}|\{candidate\}", lambda place: parts[place[0]], self.template)


def _judgement(reply: Reply) -> Judgement:
    if reply.error is not None or reply.cut:
        return Judgement(score=None, reason=reply.error or "cut_reply", raw=reply.text)
    try:
        counts = parse_green(reply.text)
    except UnreadableReplyError as error:
        return Judgement(score=None, reason=error.reason, notes=(error.detail,), raw=reply.text)
    parts = {"matched": float(counts.matched), **dict(zip(ERROR_KINDS, map(float, counts.errors), strict=True))}
    if counts.insignificant is not None:
        parts["insignificant"] = float(sum(counts.insignificant))
    return Judgement(score=counts.score, parts=parts, notes=counts.notes, raw=reply.text)


def _read_template(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the template's file read."""
    path = options.pop("template")
    if path:
        try:
            options["template"] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"the judge's template {path} cannot be read: {error}") from error
    return options


LOCAL, ENDPOINT = Loads(GreenJudge.local), Loads(GreenJudge.remote)
