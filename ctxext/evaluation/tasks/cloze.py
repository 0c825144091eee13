"""Cloze: a well-known statement to complete behind ordinary text. Part of the short-context guard.

It needs nothing from the text before it, so what it measures is whether the model still knows what it knew after
training and rewriting of positions. The statements are our own and need no download.
"""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from ctxext.evaluation.tasks.base import Draft, MetricName, Task
from ctxext.evaluation.tasks.bodies import InText

# (statement up to the blank, accepted answers)
STATEMENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The capital of France is", ("Paris",)),
    ("The capital of Italy is", ("Rome",)),
    ("The capital of Japan is", ("Tokyo",)),
    ("The capital of Germany is", ("Berlin",)),
    ("The capital of Egypt is", ("Cairo",)),
    ("The largest planet of the solar system is", ("Jupiter",)),
    ("The planet closest to the Sun is", ("Mercury",)),
    ("The Earth revolves around the", ("Sun",)),
    ("The natural satellite that lights up the night sky is the", ("Moon",)),
    ("The day after Monday is", ("Tuesday",)),
    ("The day after Friday is", ("Saturday",)),
    ("The month after January is", ("February",)),
    ("The last month of the year is", ("December",)),
    ("The opposite of hot is", ("cold",)),
    ("The opposite of up is", ("down",)),
    ("The opposite of black is", ("white",)),
    ("The opposite of left is", ("right",)),
    ("Two plus two equals", ("four", "4")),
    ("Half of ten is", ("five", "5")),
    ("A triangle has this many sides:", ("three", "3")),
    ("A week has this many days:", ("seven", "7")),
    ("A spider has this many legs:", ("eight", "8")),
    ("Water is made of hydrogen and", ("oxygen",)),
    ("At zero degrees Celsius, water turns into", ("ice",)),
    ("The gas that humans need to breathe is", ("oxygen",)),
    ("The language most people speak in Brazil is", ("Portuguese",)),
    ("The language most people speak in Mexico is", ("Spanish",)),
    ("The author of Romeo and Juliet is William", ("Shakespeare",)),
    ("The theory of relativity was developed by Albert", ("Einstein",)),
    ("The first president of the United States was George", ("Washington",)),
    ("The Statue of Liberty stands in New", ("York",)),
    ("The Eiffel Tower stands in the city of", ("Paris",)),
    ("The Great Wall was built in", ("China",)),
    ("The pyramids of Giza are in", ("Egypt",)),
    ("Mixing blue and yellow gives", ("green",)),
    ("Grass is usually the color", ("green",)),
    ("Bees make", ("honey",)),
    ("Cows give us", ("milk",)),
    ("The king of the jungle is the", ("lion",)),
    ("A baby dog is called a", ("puppy",)),
    ("A baby cat is called a", ("kitten",)),
    ("Once upon a", ("time",)),
    ("Better late than", ("never",)),
    ("Practice makes", ("perfect",)),
    ("An apple a day keeps the doctor", ("away",)),
    ("Actions speak louder than", ("words",)),
    ("Ladies and", ("gentlemen",)),
    ("The United States of", ("America",)),
)


class ClozeTask(Task):
    """Complete a well-known statement."""

    task: Literal["cloze"]

    summary: ClassVar[str] = "complete a well-known statement behind ordinary text"
    when: ClassVar[str] = "short contexts, before and after: did the extension cost knowledge?"
    source: ClassVar[str] = "ctxext, own statements"
    budget: ClassVar[int] = 6
    usual_metric: ClassVar[MetricName] = "whole_match_part"

    @property
    def spread(self) -> bool:
        """There is nothing to find in the text."""
        return True

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """One statement."""
        statement, answers = rng.choice(STATEMENTS)
        return Draft(
            intro="",
            question="\n\nComplete the sentence.",
            answer_prefix=f"\n{statement}",
            body=InText((), depth),
            answers=answers,
            key=statement,
        )
