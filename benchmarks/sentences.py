"""Text for benchmarks that run a language model: generated English, docstrings of the standard library, and sentences
written by hand that generate nothing and calibrate nothing."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path

PEOPLE = (
    "the nurse", "our neighbour", "a retired teacher", "the younger brother", "my landlord", "the chief engineer",
    "a tourist from Lisbon", "the accountant", "her grandmother", "the football coach", "an angry customer",
    "the village baker", "a doctoral student", "the bus driver", "their lawyer", "a shy musician", "the mayor",
    "the new manager", "an old fisherman", "the pilot", "a journalist", "the midwife", "his cousin", "the plumber",
)  # fmt: skip
THINGS = (
    "a letter", "the broken window", "two tickets", "the annual report", "a bottle of olive oil", "the wrong suitcase",
    "a second-hand bicycle", "the blueprint", "an umbrella", "the missing key", "some fresh bread", "a loan",
    "the garden fence", "a box of old photographs", "the medicine", "a new contract", "the coffee machine",
    "a map of the city", "the violin", "several complaints", "a small telescope", "the invoice", "warm blankets",
)  # fmt: skip
VERBS = (
    "bought", "returned", "forgot", "asked for", "repaired", "described", "found", "sold", "painted", "lost",
    "paid for", "carried", "complained about", "inherited", "borrowed", "photographed", "hid", "inspected", "ordered",
    "threw away",
)  # fmt: skip
PLACES = (
    "at the railway station", "in the kitchen", "near the harbour", "behind the church", "in a small town in Portugal",
    "on the third floor", "at the market", "during the flight", "in the waiting room", "beside the river",
    "at the university library", "in the mountains", "outside the courthouse", "in the basement", "on the ferry",
)  # fmt: skip
TIMES = (
    "yesterday", "before the storm", "last summer", "early on Sunday morning", "after the meeting", "in 1987",
    "as soon as the shop opened", "while the children slept", "a week too late", "for the third time", "at noon",
    "shortly before Christmas", "during the strike", "when nobody was watching",
)  # fmt: skip
FIELDS = (
    "economics", "marine biology", "medieval history", "machine learning", "nutrition", "urban planning", "astronomy",
    "constitutional law", "software engineering", "immunology", "linguistics", "climate science", "organic chemistry",
)  # fmt: skip
FINDINGS = (
    "prices rise faster than wages", "the effect disappears in larger samples", "sleep improves memory",
    "the older method is still more accurate", "most of the energy is lost as heat", "the cells divide more slowly",
    "readers prefer shorter sentences", "the glacier has retreated by two kilometres", "cooperation pays in the end",
    "the error grows with the square of the distance", "the dialect is older than the written records",
    "half of the patients recover without treatment", "the orbit is slightly elliptical",
)  # fmt: skip
ADJECTIVES = (
    "surprising", "expensive", "boring", "delicious", "dangerous", "charming", "unreliable", "excellent", "noisy",
    "comfortable", "overrated", "friendly", "dirty", "fast", "complicated", "beautiful", "mediocre", "fragile",
)  # fmt: skip
SUBJECTS = (
    "the hotel", "this phone", "the second season", "the soup", "their customer service", "the museum", "the new album",
    "that restaurant", "the battery", "the museum's guided tour", "the novel", "the train to Vienna",
    "the software update", "the concert", "the apartment", "the vacuum cleaner",
)  # fmt: skip
TASKS = (
    "renew a passport", "remove red wine from a carpet", "train a puppy", "cook rice without a pot lid",
    "reset the router", "file a tax return", "learn to swim as an adult", "calculate the area of a trapezoid",
    "grow tomatoes on a balcony", "cancel a subscription", "back up a database", "treat a burn", "tune a guitar",
    "write a cover letter", "change a flat tyre", "find cheap flights", "merge two branches", "lower cholesterol",
)  # fmt: skip
SCIENCE = (
    "water expands when it freezes", "the moon has no atmosphere", "light bends near massive objects",
    "enzymes lower the activation energy of reactions", "glass is an amorphous solid", "sharks are older than trees",
    "copper conducts electricity better than iron", "the heart of a whale beats eight times a minute",
    "prime numbers thin out as they grow", "salt lowers the freezing point of water", "bees see ultraviolet light",
)  # fmt: skip

PATTERNS = (
    "{Person} {verb} {thing} {place} {time}.",
    "{Time}, {person} {verb} {thing}, although {person2} had warned everyone about {thing2}.",
    "How do I {task}?",
    "What is the best way to {task} and {task2}?",
    "{Subject} was {adjective}, but {subject2} turned out to be {adjective2}.",
    "Recent work in {field} suggests that {finding}.",
    "It is well known that {science}, yet few people ask why.",
    '"{Subject} is {adjective}," said {person}, and {verb} {thing}.',
    "If {science}, then {finding}.",
    "Nobody told {person} that {person2} {verb} {thing} {place}.",
    "{Finding}: this is what a conference on {field} heard {time}.",
    "Please help me {task}; I have {number} minutes and {thing}.",
    "{Person} earns {number} euros a day and studies {field} at night.",
    "I would not recommend {subject}: it is {adjective} and {adjective2}, and it costs {number} dollars.",
    "{Person}, {person2} and {person3} met {place} to talk about {field}.",
    "Does anybody know whether {subject} is still {adjective}?",
    "In {field}, {number} of the {number2} studies agree that {finding}.",
    "{Science}; therefore {person} {verb} {thing}.",
)

EVALUATION = (
    "The kettle whistled long before anyone woke up.",
    "Which planet has the shortest year?",
    "Shares of the carmaker fell seven percent after the recall was announced.",
    "My cat refuses to drink from anything but the bathroom tap.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen.",
    "Can you recommend a quiet beach that is easy to reach by tram?",
    "The defendant pleaded guilty to two counts of fraud.",
    "A recursive function must have a case in which it does not call itself.",
    "It rained so hard that the parade was moved indoors.",
    "He tightened the last bolt, wiped his hands and started the engine.",
    "Vaccines train the immune system without causing the disease.",
    "The senate will vote on the amended bill next Thursday.",
    "I lost my luggage somewhere between Oslo and Athens.",
    "Dark chocolate contains less sugar than milk chocolate.",
    "The sonata ends on a chord that nobody expects.",
    "Why does bread go stale faster in the refrigerator?",
    "Our team conceded three goals in the first ten minutes.",
    "She translated the poem twice and burned both versions.",
    "An index makes a query faster and an insert slower.",
    "The bridge was closed to lorries because of a crack in one pillar.",
    "There is nothing on the menu that I can eat.",
    "Two chemists were awarded the prize for their work on catalysts.",
    "Turn left at the pharmacy and follow the canal to the mill.",
    "The film is visually stunning, but its plot makes no sense.",
    "Interest rates were left unchanged for the fifth month in a row.",
    "A group of dolphins followed the boat until sunset.",
    "What documents do I need to open a bank account abroad?",
    "The printer is out of toner again.",
    "Mount Kilimanjaro is the highest mountain in Africa.",
    "They named their daughter after a character in a Russian novel.",
    "The patch closes a hole that let attackers read other users' files.",
    "Old houses creak at night as the timber cools.",
    "Nobody has seen the northern white rhinoceros in the wild since 2008.",
    "Stir the sauce constantly, or it will burn.",
    "The flight was delayed by fog, so we missed the wedding.",
    "He collects stamps from countries that no longer exist.",
    "Entropy never decreases in an isolated system.",
    "The committee could not agree on a colour for the new uniforms.",
    "Is it safe to charge my phone overnight?",
    "Farmers fear that the drought will ruin the olive harvest.",
    "After the surgery she had to learn to walk again.",
    "A triangle with sides of three, four and five has a right angle.",
    "The choir sang in a language that none of them spoke.",
    "You must be at least eighteen to rent a car here.",
    "The telescope found water vapour in the atmosphere of a distant planet.",
    "I have been waiting for a refund since February.",
    "Wolves returned to the valley after an absence of a century.",
    "The proof is short, elegant and wrong.",
)
"""For the comparison of embeddings only."""


def english(count: int, seed: int = 0) -> list[str]:
    """Generated sentences, no two equal."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_sentence(draw)] = None
    return list(found)


def docstrings(characters: int) -> list[str]:
    """Paragraphs of the docstrings of this interpreter's standard library, modules in alphabetical order."""
    found: list[str] = []
    held = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            text = (ast.get_docstring(node) if documented else None) or ""  # type: ignore[arg-type]
            for paragraph in text.split("\n\n"):
                if len(paragraph) >= 40:
                    found.append(" ".join(paragraph.split())[:600])
                    held += len(found[-1])
                if held >= characters:
                    return found
    return found


def _sentence(draw: random.Random) -> str:
    words = {
        "person": PEOPLE, "thing": THINGS, "verb": VERBS, "place": PLACES, "time": TIMES, "field": FIELDS,
        "finding": FINDINGS, "adjective": ADJECTIVES, "subject": SUBJECTS, "task": TASKS, "science": SCIENCE,
        "number": tuple(str(number) for number in range(2, 400)),
    }  # fmt: skip
    chosen: dict[str, str] = {}
    for name, options in words.items():
        picked = draw.sample(options, 3)
        for ending, word in zip(("", "2", "3"), picked, strict=True):
            chosen[name + ending] = word
            chosen[(name + ending).capitalize()] = word[:1].upper() + word[1:]
    return draw.choice(PATTERNS).format(**chosen)
