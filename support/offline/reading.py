"""Split texts into words and sentences, and plan searches, for the offline model. All functions are pure."""

import re
from collections.abc import Sequence

MAX_SEARCHES = 3
SHORTEST_QUOTE = 5  # words; a shorter sentence says too little on its own

STOPWORDS = frozenset(
    """
    a about an and any are as at be been but by can could did do does for from had has have how i if in into is it its
    many may me might more most much my no not of on or our please s should so some t tell than that the their them
    then there these they this to us use used using was we were what when where which who whom whose why will with
    work works would you your explain describe give find show compare compared comparison difference differences
    between versus vs both mean means answer briefly question
    """.split()  # noqa: SIM905 - a list of a hundred strings would be harder to read
)

# Endings of words, each with its replacement. The replacements give all forms of a word the same stem. Longer endings
# come first.
_ENDINGS = (
    ("ability", "abl"),
    ("ibility", "ibl"),
    ("ations", "at"),
    ("ation", "at"),
    ("encies", "ent"),
    ("ency", "ent"),
    ("ings", ""),
    ("ing", ""),
    ("ions", ""),
    ("ion", ""),
    ("ies", ""),
    ("ied", ""),
    ("ers", "er"),
    ("ed", ""),
    ("es", ""),
    ("ly", ""),
    ("s", ""),
    ("e", ""),
    ("y", ""),
)
_OPENING = re.compile(
    r"^(?:(?:please|and|so|but)\s+|tell me\s+|explain\s+|describe\s+|show me\s+|find\s+|compare\s+|comparing\s+)*"
    r"(?:(?:what|which|who|how|why|when|where)(?:'s|\s+(?:is|are|was|were|does|do|did|can|should|much|many))*\s+"
    r"|(?:is|are|was|were|does|do|did|can|should)\s+(?:i|we|you|one)\s+(?:use|choose|prefer|pick)?\s*)?"
    r"(?:(?:a |the )?(?:comparison|differences?)\s+(?:of|between|in)\s+)?(?:the\s+|a\s+|an\s+|both\s+)?",
    re.IGNORECASE,
)
_COMPARES = re.compile(r"\b(?:vs|versus|compare[ds]?|comparing|comparison|differences?|or)\b", re.IGNORECASE)
_BETWEEN_SUBJECTS = re.compile(
    r"\s*,\s*(?:and|or)\s+|\s*,\s*|\s+(?:and|or|vs\.?|versus|compared (?:to|with))\s+", re.IGNORECASE
)
_ATTRIBUTE = re.compile(r"^(.+\s(?:of|in|for|between)\s+(?:the\s+)?)(\S.*)$", re.IGNORECASE)
_QUALIFIER = re.compile(r"^(\S.*?)(\s+(?:in|for|on|at|during)\s+.+)$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(]*[A-Z0-9À-ÞА-Я])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|Dr|Mr|Mrs|Ms|Prof|St|No|approx|ca)|\b[A-Z](?:\.[A-Z])*)\.$")
_LARGE_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d (?:million|billion)")
# A sentence that begins with one of these words refers to another sentence, so it is a worse quote on its own.
_LEANING = ("It ", "They ", "This ", "That ", "These ", "Those ", "He ", "She ", "Such ")
_QUOTED = re.compile(r'"([^"]+)"\s+\[\d+\]')


def words(text: str) -> list[str]:
    """Return the stems of a text's content words, lower-case, in order."""
    found = re.findall(r"\w+", text.lower().replace("'s", ""))
    return [stem(word) for word in found if word not in STOPWORDS]


def stem(word: str) -> str:
    """Return the stem of a word: "thread" for "threads" and for "threading". The rules are crude."""
    for ending, replacement in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) + len(replacement) >= 3:
            word = word[: len(word) - len(ending)] + replacement
            if ending in ("ing", "ings", "ed") and len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
                word = word[:-1]  # "runn", which is left of "running", becomes "run"
            return word
    return word


def plan_searches(question: str) -> list[str]:
    """Return one to three search queries for a question. A comparison gets one for each subject.

    "What is the population of Tokyo vs New York?" asks for "population of Tokyo" and "population of New York".
    """
    asked = [part.strip() for part in re.split(r"(?<=[?])\s+", question.strip()) if "?" in part] or [question.strip()]
    planned: list[str] = []
    for part in asked:
        for query in _subjects(" ".join(part.split()).strip(" ?!.\"'")):
            if query not in planned and words(query):
                planned.append(query)
    return planned[:MAX_SEARCHES]


def _subjects(question: str) -> list[str]:
    core = _OPENING.sub("", question, count=1).strip()
    if not words(core):
        core = question
    parts = [part.strip() for part in _BETWEEN_SUBJECTS.split(core) if part.strip()]
    if len(parts) < 2:
        return [core]
    attribute = _ATTRIBUTE.match(parts[0])
    # Treat "A and B" as two subjects only if the question compares A with B, or if A and B are names and the question
    # asks for the same attribute of both.
    names = all(re.match(r"(?:of |in |for )?(?:the )?[A-Z0-9]", part) for part in parts[1:])
    if not (_COMPARES.search(question) or (names and (attribute or parts[0][:1].isupper()))):
        return [core]
    return _complete(parts, attribute)


def _complete(parts: list[str], attribute: re.Match[str] | None) -> list[str]:
    """Complete each part with the words that stand in only one part but belong to all.

    For example, "Tokyo" and "New York population" become "Tokyo population" and "New York population".
    """
    first, *others = parts
    if attribute and len(words(attribute[1])) > 0:
        prefix, first = attribute[1], attribute[2]
        others = [re.sub(r"^(?:of|in|for)\s+(?:the\s+)?", "", other) for other in others]
    else:
        prefix = ""
    last = others[-1]
    qualifier = _QUALIFIER.match(last)
    trailing = re.match(r"^((?:[A-Z0-9]\S*\s+)*[A-Z0-9]\S*)((?:\s+[a-z]\S*)+)$", last)
    suffix = ""
    if qualifier and not _QUALIFIER.match(first):
        others[-1], suffix = qualifier[1], qualifier[2]
    elif trailing and first[:1].isupper() and " " not in prefix:
        others[-1], suffix = trailing[1], trailing[2]
    asks_itself = [bool(prefix) and bool(_ATTRIBUTE.match(other)) for other in others]
    completed = [prefix + first + suffix]
    for other, alone in zip(others, asks_itself, strict=True):
        completed.append(other + suffix if alone else prefix + other + suffix)
    return [query for query in completed if words(query)]


def sentences(text: str) -> list[str]:
    """Return the sentences of prose in a Markdown text, verbatim.

    Headings, tables and code are left out. Sentences with a double quote are left out: an answer can't quote them.
    """
    found: list[str] = []
    for block in _prose_blocks(text):
        start = 0
        ends = [match.start() for match in _SENTENCE_END.finditer(block)] + [len(block)]
        for end in ends:
            sentence = block[start:end].strip()
            if end < len(block) and _ABBREVIATION.search(sentence):
                continue
            start = end
            if sentence.endswith((".", "!", "?")) and '"' not in sentence and len(sentence.split()) >= SHORTEST_QUOTE:
                found.append(sentence)
    return found


def _prose_blocks(text: str) -> list[str]:
    blocks: list[str] = []
    in_code = False
    current: list[str] = []
    for line in [*text.split("\n"), ""]:
        bare = line.strip()
        if bare.startswith(("```", "~~~")):
            in_code = not in_code
            bare = ""
        marker = re.match(r"(?:[-*+]|\d+[.)])\s+", bare)
        if in_code or not bare or marker or bare.startswith(("#", "|", ">", "[cut:")):
            if current:
                blocks.append("\n".join(current))
            current = []
            if marker and not in_code:
                current = [bare[marker.end() :]]
        else:
            current.append(line)
    return blocks


def coverage(query: str, text: str) -> float:
    """Return the share of the query's content words that the text holds."""
    asked = set(words(query))
    return len(asked & set(words(text))) / len(asked) if asked else 0.0


def choose_sentences(query: str, text: str, limit: int, *, title: str = "") -> list[str]:
    """Return up to `limit` sentences of the text that say most about the query, in the text's order.

    A query word that is in `title` counts half, because the whole page is about that word.
    """
    asked = set(words(query))
    named = set(words(title))
    counts_people = re.search(r"\b(?:populations?|people|inhabitants|many)\b", query.lower())
    scored: list[tuple[float, int, str]] = []
    for position, sentence in enumerate(sentences(text)):
        said = set(words(sentence))
        score = sum(0.5 if word in named else 1.0 for word in asked & said)
        if not score:
            continue
        if counts_people and _LARGE_NUMBER.search(sentence):
            score += 1.0
        if asked & set(words(" ".join(sentence.split()[:3]))):
            score += 0.5  # the sentence begins with a word of the query
        if sentence.startswith(_LEANING) or "therefore" in sentence.split()[:4]:
            score -= 0.5
        score += 1.0 / (position + 1)  # prefer early sentences: a page begins with the most important ones
        scored.append((score, position, sentence))
    best = sorted(scored, key=lambda entry: (-entry[0], entry[1]))[:limit]
    return [sentence for _, _, sentence in sorted(best, key=lambda entry: entry[1])]


def quoted(text: str) -> list[str]:
    """Return the quoted sentences in an answer of the offline model. A source's number follows each quote."""
    return _QUOTED.findall(text)


def best_passage(query: str, text: str, limit: int) -> str:
    """Return the sentences of a text that say most about the query, up to `limit` characters."""
    everything = sentences(text)
    chosen = choose_sentences(query, text, 1) or everything[:1]
    if not chosen:
        return text.strip()[:limit]
    start = everything.index(chosen[0])
    return _joined(everything[start:], limit)


def _joined(parts: Sequence[str], limit: int) -> str:
    passage = parts[0]
    for part in parts[1:]:
        if len(passage) + 1 + len(part) > limit:
            break
        passage = f"{passage} {part}"
    return passage
