"""Case notes: a patient invented by chance around the typical picture of a condition, in one of four forms."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """The typical picture of a condition, in noun phrases."""

    condition: str
    severity: str  # a key of VITALS
    who: str  # a key of PEOPLE
    symptoms: str
    finding: str
    result: str
    plan: str


@dataclass(frozen=True)
class Patient:
    """Who the note is about: `described` as in "a 54-year-old nurse", and the pronouns."""

    described: str
    they: str
    them: str
    small: bool  # an infant or a child, whose vital signs are other than an adult's


# youngest, oldest (years; months for an infant), share of women
PEOPLE = {
    "adult": (32, 79, 0.5),
    "old": (66, 91, 0.5),
    "old woman": (66, 91, 1.0),
    "young": (19, 39, 0.5),
    "woman": (22, 74, 1.0),
    "mother": (21, 41, 1.0),
    "child": (3, 11, 0.5),
    "infant": (2, 9, 0.5),
}
# lowest and highest: temperature in tenths of a degree, pulse, systolic pressure, respiratory rate, saturation
VITALS = {
    "well": ((362, 371), (60, 84), (112, 138), (12, 16), (96, 99)),
    "febrile": ((382, 396), (96, 118), (104, 128), (19, 26), (92, 97)),
    "breathless": ((366, 377), (96, 122), (114, 148), (24, 34), (87, 93)),
    "fast": ((364, 374), (112, 146), (104, 134), (16, 22), (94, 98)),
    "shocked": ((360, 390), (112, 138), (72, 92), (22, 30), (91, 96)),
    "hypertensive": ((362, 372), (70, 96), (164, 198), (14, 20), (94, 98)),
}
# fmt: off
WORK = (
    "teacher", "farmer", "nurse", "baker", "carpenter", "driver", "librarian", "cook", "cleaner", "gardener",
    "electrician", "shopkeeper", "clerk", "tailor", "plumber", "musician", "postman", "builder", "accountant",
    "seamstress", "fisherman", "mechanic",
)
# fmt: on
BACKGROUND = (
    "There is no past illness of note and no regular medicine.",
    "The past history includes high blood pressure, for which one tablet is taken.",
    "A broken ankle healed years ago without complications.",
    "A grandfather had heart disease after the age of seventy.",
    "Smoking was given up two years ago, and alcohol is taken at weekends only.",
    "Twenty cigarettes are smoked each day, and there is a morning cough.",
    "Home is a flat on the third floor, shared with a partner and a dog.",
    "There is an allergy to latex, which causes a rash under gloves.",
    "The patient lives alone, shops without help and reads a newspaper every day.",
    "A sister has a disease of the thyroid; otherwise the family is healthy.",
)
CHILDHOOD = (
    "Birth was at term, growth is along the middle line, and vaccinations are up to date.",
    "An elder brother has had a cold this week, and nobody smokes at home.",
    "There were no illnesses before, and the parents are worried about the nights.",
)
OUTCOME = (
    "Two days later the patient felt much better and was eating again.",
    "At the next visit there were fewer complaints, and the plan was left as it was.",
    "Recovery was slow at first but complete after a month.",
    "The family was told which signs should bring them back without delay.",
    "A written plan was given, and a copy went to the general practitioner.",
    "The results were explained in plain words, and there was time for questions.",
    "A week later there had been no further trouble.",
    "We agreed to speak by telephone in a few days and to meet again in a month.",
)


def write_case(case: Case, number: int, chance: random.Random) -> str:
    """A case note about a newly invented patient; `number` chooses the form."""
    forms = (_narrative, _structured, _letter, _handover)
    return forms[number % len(forms)](case, _invent(case.who, chance), chance)


def _invent(who: str, chance: random.Random) -> Patient:
    youngest, oldest, women = PEOPLE[who]
    age, woman = chance.randint(youngest, oldest), chance.random() < women
    they, them = ("she", "her") if woman else ("he", "him")
    if who in ("infant", "child"):
        unit, noun = ("month" if who == "infant" else "year"), ("girl" if woman else "boy")
        return Patient(f"{age}-{unit}-old {noun}", they, them, small=True)
    plain = "woman" if woman else "man"
    noun = plain if who == "mother" or chance.random() < 0.4 else chance.choice(WORK)
    return Patient(f"{age}-year-old {'retired ' if age > 66 and noun != plain else ''}{noun}", they, them, small=False)


def _article(text: str) -> str:
    eight = text.startswith(("8", "11-", "18-"))
    return f"{'An' if eight else 'A'} {text}"


def _vitals(case: Case, patient: Patient, chance: random.Random) -> str:
    temperature, pulse, systolic, breaths, saturation = (chance.randint(*limits) for limits in VITALS[case.severity])
    degrees = f"{temperature / 10:.1f} °C"
    if patient.small:
        pulse, breaths = pulse + 35, breaths + 18
        return f"temperature {degrees}, pulse {pulse}, respiratory rate {breaths}, saturation {saturation} % in air"
    pressure = f"{systolic}/{round(systolic * 0.6) + chance.randint(-4, 6)} mmHg"
    return chance.choice(
        (
            f"temperature {degrees}, pulse {pulse}, blood pressure {pressure}, saturation {saturation} % in air",
            f"pulse {pulse}, blood pressure {pressure}, respiratory rate {breaths}, temperature {degrees}",
            f"blood pressure {pressure}, pulse {pulse}, saturation {saturation} %, respiratory rate {breaths}",
        )
    )


def _background(patient: Patient, chance: random.Random) -> str:
    return chance.choice(CHILDHOOD if patient.small else BACKGROUND)


def _narrative(case: Case, patient: Patient, chance: random.Random) -> str:
    place = chance.choice(("came to the surgery", "was seen at home", "was brought to the emergency department"))
    diagnosis = chance.choice(("The diagnosis was", "This was", "All of it pointed to"))
    return (
        f"{_article(patient.described)} {place} with {case.symptoms}. {_background(patient, chance)} "
        f"Examination showed {case.finding}. Observations: {_vitals(case, patient, chance)}. "
        f"The next finding was {case.result}. {diagnosis} {case.condition}, and {patient.they} was treated "
        f"accordingly: {case.plan}. {chance.choice(OUTCOME)}"
    )


def _structured(case: Case, patient: Patient, chance: random.Random) -> str:
    return "\n".join(
        (
            f"Case note: {patient.described}",
            f"Complaint: {case.symptoms}.",
            f"History: {_background(patient, chance)}",
            f"Observations: {_vitals(case, patient, chance)}.",
            f"Examination: {case.finding}.",
            f"Results: {case.result}.",
            f"Impression: {case.condition}.",
            f"Plan: {case.plan}.",
        )
    )


def _letter(case: Case, patient: Patient, chance: random.Random) -> str:
    opening = chance.choice(("Thank you for seeing this", "I should be grateful for your opinion on this"))
    return (
        f"Dear colleague,\n{opening} {patient.described}, who has {case.symptoms}. {_background(patient, chance)} "
        f"On examination I found {case.finding}; {_vitals(case, patient, chance)}. We now have {case.result}. "
        f"I believe that this is {case.condition}. We have begun with {case.plan}. {chance.choice(OUTCOME)}\n"
        f"With kind regards"
    )


def _handover(case: Case, patient: Patient, chance: random.Random) -> str:
    return (
        f"Handover, bed {chance.randint(1, 28)}: {patient.described}, day {chance.randint(1, 6)} with "
        f"{case.condition}. Came in with {case.symptoms}. On arrival: {case.finding}, and later {case.result}. "
        f"Now {_vitals(case, patient, chance)}. In progress: {case.plan}. "
        f"Please look in on {patient.them} tonight and {_task(chance)}."
    )


def _task(chance: random.Random) -> str:
    return chance.choice(
        (
            "repeat the observations every four hours",
            "check the blood results at ten",
            "speak with the family, who will come after supper",
            "call the registrar if the pressure falls",
            "write up something for pain and for sleep",
            "make sure that enough is drunk",
        )
    )
