"""Composes the sample corpus (../data/*.jsonl) from the notes in this folder, the same each time.

    python examples/quickstart/corpus/compose.py

Every condition becomes a guideline, questions with answers and four case notes; every medicine and procedure a page
and a leaflet. Every eighth topic is held out with all that was written from it, so no sentence about it is trained on.
The quickstart does not need this script: the corpus is shipped. The texts are illustrative and no medical advice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cases import Case, write_case

FOLDER = Path(__file__).resolve().parent
KINDS = ("conditions", "medicines", "procedures")
EVERY, OFFSET = 8, 5  # topic number OFFSET and every EVERY-th after it is held out
CASES = 4
SEED = 20

HEADINGS = (
    {
        "about": "",
        "features": "Clinical features",
        "tests": "Investigation",
        "treatment": "Treatment",
        "danger": "When to act at once",
        "follow-up": "Follow-up",
    },
    {
        "about": "Background",
        "features": "Presentation",
        "tests": "Making the diagnosis",
        "treatment": "Management",
        "danger": "Red flags",
        "follow-up": "Later care",
    },
    dict.fromkeys(("about", "features", "tests", "treatment", "danger", "follow-up"), ""),
)
QUESTIONS = {
    "about": ("What is {topic}?", "What lies behind {topic}?", "How would you explain {topic} to a student?"),
    "features": (
        "How does {topic} present?",
        "What should make one think of {topic}?",
        "Which signs point to {topic}?",
    ),
    "tests": ("Which tests are useful in {topic}?", "How is {topic} confirmed?", "What is to be measured in {topic}?"),
    "treatment": ("How is {topic} treated?", "What helps in {topic}?", "What should be offered for {topic}?"),
    "danger": ("What must not be missed in {topic}?", "When is {topic} an emergency?"),
    "follow-up": ("What comes after the first weeks of {topic}?", "How is {topic} followed up?"),
}
PAGE = {
    "uses": "Uses",
    "cautions": "Cautions",
    "monitoring": "Monitoring",
    "before": "Before",
    "method": "Method",
    "after": "Afterwards",
}


@dataclass
class Topic:
    """One entry of the notes: its title and its fields in the order of the file."""

    title: str
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The title as it stands within a sentence: proper names keep their capital."""
        return self.title if self.title.split()[0] == "Parkinson" else self.title[0].lower() + self.title[1:]


def read_topics(path: Path) -> list[Topic]:
    """The entries of a file of notes: `## Title`, then lines `field: text`."""
    topics: list[Topic] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            topics.append(Topic(line.removeprefix("## ")))
        elif line:
            name, text = line.split(": ", 1)
            topics[-1].fields[name] = text
    return topics


def documents(topic: Topic, chance: random.Random) -> Iterator[str]:
    """All that is written about one topic."""
    if "case" in topic.fields:
        yield _guideline(topic, chance)
        yield _questions(topic, chance)
        severity, who, symptoms, finding, result, plan = topic.fields["case"].split(" | ")
        for number in range(CASES):
            yield write_case(Case(topic.name, severity, who, symptoms, finding, result, plan), number, chance)
    else:
        yield _page(topic)
        yield _leaflet(topic, chance)


def _guideline(topic: Topic, chance: random.Random) -> str:
    headings = chance.choice(HEADINGS)
    parts = [f"{headings[name]}: {topic.fields[name]}" if headings[name] else topic.fields[name] for name in headings]
    return f"{topic.title}\n\n" + "\n".join(parts)


def _questions(topic: Topic, chance: random.Random) -> str:
    asked = chance.sample(list(QUESTIONS), 3)
    pairs = [
        f"Question: {chance.choice(QUESTIONS[name]).format(topic=topic.name)}\nAnswer: {topic.fields[name]}"
        for name in QUESTIONS
        if name in asked
    ]
    return "\n".join(pairs)


def _page(topic: Topic) -> str:
    parts = [f"{PAGE[name]}: {text}" for name, text in topic.fields.items() if name in PAGE]
    return "\n".join([topic.title, "", topic.fields["about"], *parts])


def _leaflet(topic: Topic, chance: random.Random) -> str:
    question, answer = topic.fields["ask"].split(" | ")
    told = topic.fields[chance.choice([name for name in topic.fields if name in PAGE])]
    return f"Information for patients: {topic.name}\n\n{topic.fields['about']} {told}\nYou asked: {question}\n{answer}"


def compose() -> tuple[list[str], list[str]]:
    """The documents to train on and those held out, as lines of JSON; the former in a mixed order."""
    train: list[str] = []
    held_out: list[str] = []
    number = 0
    for kind in KINDS:
        for topic in read_topics(FOLDER / f"{kind}.txt"):
            chance = random.Random(f"{SEED}/{topic.title}")
            target = held_out if number % EVERY == OFFSET else train
            target += [
                json.dumps({"topic": topic.title, "text": text}, ensure_ascii=False)
                for text in documents(topic, chance)
            ]
            number += 1
    random.Random(SEED).shuffle(train)
    return train, held_out


def main() -> None:
    for name, lines in zip(("train", "heldout"), compose(), strict=True):
        path = FOLDER.parent / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(lines)} documents, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
