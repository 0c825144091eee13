"""Seeded prose of common words: sentences without meaning that never repeat, for tests and the tiny model.

Not a stand-in for real text in any claim about a real model.
"""

from __future__ import annotations

import random

# Common English words, chosen so that none occurs in a needle or a question of the evaluation.
WORDS: tuple[str, ...] = tuple(
    """
    able about above across after again air along also always among animal another answer apple around autumn away
    back bake ball bank bath bear beautiful bed before began behind below better between bird black blue boat body
    book both bottom bread break bridge bright bring brother brown build butter call came can car carry cat catch
    chair change child city class clean clear close cloud coat cold color come common cook cool corn country cover
    cross cry cup cut dance dark daughter day deep desk did different dinner dog door down draw dream dress drink
    drive dry each early earth east eat egg eight end enough evening every eye face family far farm fast father
    feel field fill find fire first fish five floor flower fly follow food foot forest form four free fresh friend
    from front fruit full game garden gave gentle girl give glass gold good grass great green ground group grow
    hand happy hard hat head hear heart heavy help high hill hold home horse hot hour house ice idea inside iron
    island join jump keep kind king kitchen knife lake lamp land large last late laugh leaf learn leave left leg
    letter light line listen little live long look lost loud love low lunch make man many map mark market may meal
    meat meet melt middle milk mind minute moon more morning mother mountain mouth move music near neck need never
    new next nice night nine noise north nose note now ocean off often old once only open orange other our outside
    over own page paint pair paper park part path pay pear people piece pink place plain plan plant play point
    pond poor press pretty pull pure push put quick quiet rain reach read ready red rest rice rich ride right ring
    river road rock roof room root rope rose round run sad safe sail salt same sand school sea season seat seed
    sell send seven shade shape sharp sheep ship shirt shoe shop short shoulder show side silver sing sister sit
    six skin sky sleep slow small smell smile smooth snow soft soil some son song soon sound soup south speak
    spoon sport spring stand star start stay steam step still stone stop storm story street strong sugar summer
    sun sweet swim table tail take talk tall taste tea ten thick thin think three time today together tomorrow
    town train travel tree true turn two uncle under until upon valley very village visit voice wait walk wall
    warm wash watch water wave way wear weather week well west wet wheat wheel white wide wild wind window wing
    winter wish with wonder wood wool work world write yard year yellow young
    """.split()
)


def sentence(rng: random.Random) -> str:
    """One sentence of 5-12 words, capital-free so that every word is one token of a word tokenizer."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 12))) + "."


def document(seed: str, num_sentences: int = 8) -> str:
    """One paragraph, a pure function of `seed`."""
    rng = random.Random(seed)
    return " ".join(sentence(rng) for _ in range(num_sentences))
