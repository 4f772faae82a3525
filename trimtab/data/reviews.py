"""Prompts that ask for reviews: the project's own prompts for the controlled-sentiment experiment.

Every prompt is neutral: it says what the review is about and never how it was, so that good and bad reviews are both
natural answers. A subject (a thing and one aspect of it) belongs to one split only.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Literal

from ..records import Prompt

Split = Literal["train", "heldout"]
Subject = tuple[str, str]

ASPECTS: dict[str, tuple[str, ...]] = {
    "film": ("plot", "acting", "music", "ending", "dialogue", "camera work", "pacing", "main character"),
    "television series": ("first episode", "cast", "writing", "final season", "humour", "main storyline"),
    "stage play": ("script", "lead actor", "set design", "second act", "seating", "sound"),
    "concert": ("sound", "singer", "song selection", "lighting", "venue", "opening act"),
    "novel": ("plot", "characters", "writing style", "ending", "opening chapter", "dialogue"),
    "cookbook": ("recipes", "photographs", "instructions", "choice of ingredients", "layout", "binding"),
    "video game": ("controls", "graphics", "story", "difficulty", "soundtrack", "multiplayer mode"),
    "board game": ("rules", "pieces", "playing time", "artwork", "box", "strategy"),
    "restaurant": ("food", "service", "prices", "atmosphere", "desserts", "wine list", "portions", "waiting time"),
    "café": ("coffee", "cakes", "staff", "seating", "breakfast menu", "opening hours"),
    "pizza delivery": ("crust", "toppings", "delivery time", "packaging", "driver", "price"),
    "bakery": ("bread", "pastries", "queue", "staff", "choice", "prices"),
    "hotel": ("room", "breakfast", "staff", "location", "bathroom", "bed", "pool", "check-in"),
    "hostel": ("dormitory", "kitchen", "showers", "common room", "location", "staff"),
    "campsite": ("pitches", "washrooms", "noise at night", "view", "shop", "owner"),
    "airline flight": ("seat", "meal", "crew", "boarding", "legroom", "entertainment"),
    "train journey": ("seat", "punctuality", "dining car", "conductor", "windows", "ticket price"),
    "city tour": ("guide", "route", "pace", "stories", "group size", "price"),
    "museum": ("collection", "audio guide", "tickets", "gift shop", "building", "temporary exhibition"),
    "mobile phone": ("battery", "camera", "screen", "speakers", "size", "keyboard"),
    "laptop": ("keyboard", "screen", "fan", "battery", "weight", "touchpad"),
    "pair of headphones": ("sound", "comfort", "cable", "noise cancelling", "case", "microphone"),
    "vacuum cleaner": ("suction", "noise", "weight", "dust container", "cord", "attachments"),
    "coffee machine": ("taste of the coffee", "noise", "water tank", "cleaning", "size", "timer"),
    "washing machine": ("noise", "programmes", "door", "display", "results", "delivery"),
    "pair of running shoes": ("fit", "sole", "colour", "laces", "durability", "weight"),
    "winter coat": ("lining", "zip", "pockets", "fit", "hood", "fabric"),
    "backpack": ("straps", "pockets", "zips", "size", "material", "colour"),
    "bicycle": ("saddle", "brakes", "gears", "frame", "assembly", "lights"),
    "tent": ("poles", "floor", "setting up", "rain cover", "weight", "bag"),
    "sofa": ("cushions", "fabric", "assembly", "delivery", "colour", "size"),
    "mattress": ("firmness", "smell", "cover", "delivery", "edges", "height"),
    "hairdresser": ("haircut", "conversation", "waiting time", "price", "salon", "appointment booking"),
    "gym": ("equipment", "changing rooms", "trainers", "opening hours", "classes", "membership fee"),
    "dentist": ("waiting room", "treatment", "explanations", "reception", "appointment", "bill"),
    "language course": ("teacher", "textbook", "pace", "homework", "classroom", "price"),
    "online shop": ("website", "delivery", "packaging", "customer service", "choice", "returns"),
    "garage": ("repair", "bill", "mechanic", "waiting time", "explanations", "opening hours"),
}
"""The things that are reviewed, each with aspects that a customer may have liked or not."""

REQUESTS = (
    "Write one sentence of a customer review about the {aspect} of a {thing}.",
    "Write one sentence of a customer review about the {aspect} of a {thing}. It may praise or complain.",
    "Write a short review of a {thing}. Talk about the {aspect}.",
    "Write two sentences from an honest review of a {thing}, about the {aspect}.",
    "Write a very short online review that mentions the {aspect} of a {thing}.",
    "Write a very short review of a {thing}: did the {aspect} please you or disappoint you?",
    "A customer gives a {thing} between one and five stars because of the {aspect}. Write the review in one sentence.",
    "You are a customer. Say in one sentence what you thought of the {aspect} of the {thing}.",
    "Did you find the {aspect} of the {thing} good or bad? Answer in one sentence, as a customer.",
    "A friend asks about the {aspect} of the {thing}. Answer in one or two sentences.",
    "Would you pay for this {thing} again? Answer in one sentence and mention the {aspect}.",
    "What about the {aspect} of the {thing}? Answer like a customer, in one sentence.",
)
"""What the model is asked for. None of them hints at praise or blame alone."""

OPENINGS = (
    "Review of a {thing}: the {aspect}",
    "I have to say that the {aspect} of this {thing}",
    "We tried this {thing} last week and found the {aspect}",
    "Speaking of the {aspect}, the {thing} was",
    "About the {thing}: in my opinion the {aspect}",
    "Customer review of a {thing}. As for the {aspect}, I",
    "What we noticed first about this {thing}: the {aspect}",
)
"""How a review may begin, for base models that continue a text."""

HELDOUT_EVERY = 4


def subjects(split: Split) -> list[Subject]:
    """The things and aspects of a split, in a fixed order: every fourth one is held out."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split: found {split!r}, expected train or heldout")
    everything = [(thing, aspect) for thing, aspects in ASPECTS.items() for aspect in aspects]
    return [subject for index, subject in enumerate(everything) if (index % HELDOUT_EVERY == 0) == (split == "heldout")]


def draw(patterns: tuple[str, ...], count: int, *, seed: int, split: Split) -> list[tuple[str, Subject]]:
    """Distinct patterns filled with subjects of a split, `count` of them in a random order."""
    choices = list(product(patterns, subjects(split)))
    if not 0 < count <= len(choices):
        raise ValueError(f"count: found {count}, expected 1 to {len(choices)} ({split} has no more prompts)")
    chosen = random.Random(f"{seed} {split}").sample(choices, count)
    return [(pattern.format(thing=thing, aspect=aspect), (thing, aspect)) for pattern, (thing, aspect) in chosen]


def review_prompts(count: int, *, seed: int, split: Split) -> list[Prompt]:
    """Distinct conversations of one user turn that asks for a short review, the same for the same seed.

    Errors: `ValueError` for another split and for more prompts than there are.
    """
    return [
        Prompt.from_user(articled(text), columns={"thing": thing, "aspect": aspect})
        for text, (thing, aspect) in draw(REQUESTS, count, seed=seed, split=split)
    ]


def review_openings(count: int, *, seed: int, split: Split) -> list[Prompt]:
    """Distinct plain-text beginnings of reviews, the same for the same seed. Errors as `review_prompts`."""
    return [
        Prompt.from_text(articled(text), columns={"thing": thing, "aspect": aspect})
        for text, (thing, aspect) in draw(OPENINGS, count, seed=seed, split=split)
    ]


def articled(text: str) -> str:
    """The text with "an" where a vowel follows the article."""
    for vowel in "aeio":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text
