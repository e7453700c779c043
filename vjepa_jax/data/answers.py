"""Which stage of an embryo a model's answer in words states.

Answers are free text in Markdown that name other stages all over, to be ruled out; what
is not plainly one stage is none.
"""

import re

COUNTED = (
    "1-cell", "2-cell", "4-cell", "8-cell", "~14-cell", "~24-cell", "~44-cell",
    "~90-cell", "~190-cell", "~350-cell",
)
FOLDS = ("comma", "1.5-fold", "2-fold", "3-fold")

# `## 1. Developmental Stage: ...`, with or without marks, number and more words.
_HEADER = re.compile(
    r"^[\s#>*_\d.)(-]*(?:predicted |estimated |most likely )?developmental stage"
    r"(?P<title> (?:analysis|classification|assessment|identification))?[\s*_]*"
    r"(?:[:\u2013\u2014-]+|$)[\s*_]*", re.IGNORECASE,
)
# What ends a section: a heading, a numbered item, or the next thing asked for.
_NEXT = re.compile(
    r"^\s*(?:#+\s|[*_]*\d+[.)]\s|-{3,}\s*$|[-*_\s]*(?:confidence|reasoning|key features|"
    r"justification|explanation|observations?|evidence|morpholog\w+|alternatives?)\b)",
    re.IGNORECASE,
)
# Hyphens and the minus that models write for "-", and the apostrophe.
_PLAIN_MARKS = dict.fromkeys((0x2010, 0x2011, 0x2212), "-") | {0x2019: "'"}
_IN_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_WORDS = {
    "one": "1", "single": "1", "two": "2", "three": "3", "four": "4", "eight": "8",
}
# Never the end of another one, such as of 1,350.
_NUMBER = r"(?<![\d.,])(?:\d+(?:\.\d+)?)"
_RANGE = re.compile(
    rf"{_NUMBER}[\s~\u2248]*(?:-|\u2013|\u2014|/|to|or|and|through)[\s~\u2248]*{_NUMBER}"
    rf"|{_NUMBER}(?:[\s-]*(?:cells?|fold))?\s*\+"
)
_MENTION = re.compile(
    rf"(?<![^\W\d])({_NUMBER})[\s-]*(cells?|folds?)\b|\b(comma)\b", re.IGNORECASE
)
# A number that no mention holds; P1 is a cell.
_DIGIT = re.compile(r"(?<![^\W_])\d")
_NUMERAL = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|dozen|half)\b",
    re.IGNORECASE,
)
# Words with which one stage named means another, or none.
_HEDGED = re.compile(
    r"[<>\u2264\u2265?\u2026\u2190-\u21ff\u27f0-\u27ff\u2794-\u27bf]|\.\.|n't\b|[/&]"
    r"|\b(?:not|no|nor|un\w*|between|before|after|beyond|past|post|pre|exceed\w*|"
    r"less|more|fewer|earlier|later|above|below|least|most|towards?|approach\w*|"
    r"transition\w*|if|cannot|ruled?|exclud\w*|versus|vs|or|to|and|almost|near\w*|shy|"
    r"short|barely|hardly|scarcely|sub|semi|quasi|non|peri|ish|like|never|neither|"
    r"either|both|without|instead|rather|isnt|previous\w*|prior|preceding|former\w*|"
    r"last|next|following|from|into|through|till|over|possibl\w+|perhaps|maybe|may|"
    r"might|could|would|doubt\w*|tentative\w*|borderline|intermediate|mix\w*|becom\w+|"
    r"enter\w*|leaving|onset|begin\w*|start\w*|ending)\b",
    re.IGNORECASE,
)
# Of these, what casts doubt on the stage before the brackets: "(pre-gastrulation)" and
# "(elongation to follow)" do not.
_DOUBTED = re.compile(
    r"[?]|n't\b|\b(?:not|nor|or|versus|vs|cannot|ruled?|exclud\w*|earlier|later|"
    r"un(?:certain\w*|sure|clear|known|likely|til|determined)|at least|at most|almost|"
    r"nearly|shy|barely|hardly|scarcely|possibl\w+|perhaps|maybe|may|might|could|would|"
    r"doubt\w*|tentative\w*|borderline|previous\w*|if)\b",
    re.IGNORECASE,
)
# Numbers that are none of cells: how sure the model is and, in brackets, minutes.
_NO_CELLS = r"(?![\d.]|[\s-]*(?:cell|fold))"
_SURENESS = re.compile(
    rf"\bconfidence\b[\s:=~]*(?:\d+(?:\.\d+)?\s*%|[01](?:\.\d+)?|\.\d+){_NO_CELLS}",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    rf"[(\[]\s*(?:0?\.\d+|1\.0+)\s*[)\]]|{_NUMBER}\s*%|\d+(?:st|nd|rd|th)\b"
    rf"|{_NUMBER}\s*(?:min(?:ute)?s?|h(?:ou)?rs?|h|[hm]pf)\b"
    rf"|\b(?:t|time(?:[\s-]?point)?|minute|frame)[\s:=#]*{_NUMBER}{_NO_CELLS}",
    re.IGNORECASE,
)
# Ways to give a number of cells in brackets that are no mention.
_COUNTED_AS = re.compile(
    rf"({_NUMBER})\s+(?:[a-z]+\s+)?(?:cells|nuclei)\b"
    rf"|\bcount\b\W*(?:(?:of|is|was)\b\W*)?({_NUMBER}){_NO_CELLS}",
    re.IGNORECASE,
)
# Of a line that repeats what the model was told: a count or a time point.
_TOLD = re.compile(
    r"\b(?:tracked|tracking|counted|counts?|number of|time[\s-]?points?|frames?|"
    r"minutes?|[hm]pf)\b|\btime\s*[:=]|\d\s*mins?\b", re.IGNORECASE,
)
# A mention that is no mere count: "44 cells" may be one.
_CATEGORY = re.compile(
    r"\d(?:-cells?|[\s-]*folds?|[\s-]*cells?[\s-]*stage)\b|\bcomma\b", re.IGNORECASE
)
_FIRST = re.compile(rf"[~\u2248\s\d.]*(?:{_CATEGORY.pattern})", re.IGNORECASE)
# What quotes a line in Markdown, where it cannot mean "more than".
_QUOTATION = re.compile(r"^\s*>[\s>]*(?=[*_])")


def stage_of_answer(text: str) -> tuple[str, str]:
  """Returns the stage that an answer states, or why there is none.

  Only the section "Developmental Stage" is read, and of it the answer alone: the rest
  of its line, or the next line that says anything but a count or a time point. Other
  stages are named all over such texts, to be ruled out. A section of this very name
  goes before a title such as "Developmental Stage Analysis", and an answer on the
  header's line before one below it; answers of equal standing must agree.

  Args:
    text: Markdown, as the model wrote it.

  Returns:
    (stage of "vlm14", ""), or ("", reason): "no stage section", "ambiguous" (several
    stages or numbers, a range, or one that is hedged) or "unknown stage".
  """
  said = set(_said(text.translate(_PLAIN_MARKS)))
  if not said:
    return "", "no stage section"
  return said.pop() if len(said) == 1 else ("", "ambiguous")


def _said(text: str) -> list[tuple[str, str]]:
  """Returns what the sections on the stage say, of the kind of header that goes first.

  As of `stage_of_answer`: (stage, "") or ("", reason) for each answer.
  """
  own: list[tuple[str, str]] = []
  below: list[tuple[str, str]] = []
  titled: list[tuple[str, str]] = []
  section = None  # Where the answer below a header goes, until it is found.
  quoted = passed = False
  for line in text.splitlines():
    if header := _HEADER.match(line):
      section = titled if header["title"] else below
      found = titled if header["title"] else own
      quoted, passed = line.lstrip().startswith(">"), False
      answer = line[header.end():]
    elif section is None or _NEXT.match(line.lstrip()):
      section = None  # A title may be followed by the section of its name.
      continue
    else:
      found = section
      answer = line.lstrip(" \t>") if quoted else _QUOTATION.sub("", line)
    answer = answer.strip(" \t*_#:-")
    if not answer:
      continue
    outcome = _outcome(answer, own=found is own)
    if outcome is None:
      passed = True
      continue
    if passed and outcome[0] and not _FIRST.match(answer):
      outcome = "", "ambiguous"  # More of the same, or prose.
    found.append(outcome)
    section = None
  return own or below or titled


def _outcome(answer: str, own: bool) -> tuple[str, str] | None:
  """Returns what a line says, as `stage_of_answer`; None if it is no answer.

  Args:
    answer: the line.
    own: whether it goes on a header of the section's very name.
  """
  answer = re.sub(r"[*_`\"]", "", answer).replace("\u00bd", ".5")
  answer = re.sub(
      rf"(?<![\w-])({'|'.join(_WORDS)})(?=[\s-]*(?:cell|fold))",
      lambda found: _WORDS[found[0].lower()], answer, flags=re.IGNORECASE,
  )
  outcome = _stated(answer)
  outside = _IN_BRACKETS.sub(" ", answer)
  told = outside if _MENTION.search(outside) else answer
  if not _TOLD.search(told):
    return outcome
  if _CATEGORY.search(told):
    return outcome if own else ("", "ambiguous")
  if own:
    return ("", "ambiguous") if outcome[0] else outcome
  return None


def _stated(answer: str) -> tuple[str, str]:
  """Returns the stage that an answer without marks states, or why there is none."""
  answer = _SURENESS.sub(" ", answer)
  answer = _IN_BRACKETS.sub(lambda found: _ASIDE.sub(" ", found[0]), answer)
  outside = _IN_BRACKETS.sub(" ", answer)
  beside = " ".join(_IN_BRACKETS.findall(answer))
  if not _MENTION.search(outside):
    outside, beside = answer, ""
  if _RANGE.search(outside) or _HEDGED.search(outside):
    return "", "ambiguous"
  named = {_named(*found) for found in _MENTION.findall(outside)}
  if len(named) > 1:
    return "", "ambiguous"
  rest = _MENTION.sub(" ", outside)
  if named and (_DIGIT.search(rest) or _NUMERAL.search(rest)):
    return "", "ambiguous"
  stage = named.pop() if named else ""
  if stage and _contradicted(stage, beside):
    return "", "ambiguous"
  return (stage, "") if stage else ("", "unknown stage")


def _contradicted(stage: str, beside: str) -> bool:
  """Says whether what stands in brackets beside a stage is another one, or a doubt."""
  if _RANGE.search(beside) or _DOUBTED.search(beside):
    return True
  beside = _COUNTED_AS.sub(lambda found: f"{found[1] or found[2]} cells ", beside)
  # The number of cells beside a name, as in "comma (~550 cells)", is no second stage;
  # "~44-cell (or ~90-cell)" has one.
  others = {_named(*found) for found in _MENTION.findall(beside)} - {"", stage}
  return bool(others or _DIGIT.search(_MENTION.sub(" ", beside)))


def _named(number: str, kind: str, comma: str) -> str:
  """Returns the stage that a mention names, or "" for none of the categories."""
  if comma:
    return "comma"
  value = float(number)
  if not value < 1e6:
    return ""
  if kind.lower().startswith("fold"):
    name = f"{value:g}-fold"
    return name if name in FOLDS else ""
  if value == 550:
    return "comma"
  exact = {f"{int(value)}-cell", f"~{int(value)}-cell"} & set(COUNTED)
  return exact.pop() if exact and value == int(value) else ""
