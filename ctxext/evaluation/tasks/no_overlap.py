"""Retrieval without shared words: question and fact are linked by what the reader knows, not by their words.

The idea is NoLiMa's (Modarressi et al. 2025, arXiv:2502.05167): where a question repeats the fact's words, matching
them is enough; here it is not. The material is our own: no content word of a question occurs in its fact (a test
compares word stems). A few other facts about other people stand in the text, so that naming anybody is not enough.
"""

from __future__ import annotations

import random
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ctxext.evaluation.tasks.base import Draft, Item, MetricName, Task
from ctxext.evaluation.tasks.bodies import InText

NAMES = """
    Aldwin Bertil Corisande Dorothea Eluned Fenella Gaspard Hedvig Ismene Jocasta Kerensa Leofric Melisande Nerys Osric
    Perpetua Radomir Sidonie Theodric Ursula Vasilis Winifred Yseult Zdenka
    """.split()

# (fact, question)
PAIRS: tuple[tuple[str, str], ...] = (
    ("{name} has a balcony that looks out on the Eiffel Tower.", "Which person lives in Paris?"),
    ("{name} rows past the Statue of Liberty every morning.", "Which person lives in New York?"),
    ("Since spring, {name} has been selling postcards beside the Colosseum.", "Which person works in Rome?"),
    ("{name} rehearses in the opera house with the white sail-shaped roofs.", "Which person sings in Sydney?"),
    ("{name} hung a hammock within sight of Table Mountain.", "Which person is staying in Cape Town?"),
    ("{name} jogs through the Brandenburg Gate before breakfast.", "Which person lives in Berlin?"),
    ("{name} sketched the Taj Mahal from the river bank.", "Which person travelled to India?"),
    ("{name} climbed Mount Fuji at dawn.", "Which person has been to Japan?"),
    ("{name} keeps a cabin on the shore of Loch Ness.", "Which person owns property in Scotland?"),
    ("{name} photographed the great pyramid of Giza.", "Which person has visited Egypt?"),
    ("{name} proposed under the statue on Corcovado.", "Which person got engaged in Rio de Janeiro?"),
    ("{name} drinks oat milk only, because cheese and butter bring cramps.", "Which person cannot digest lactose?"),
    ("{name} never orders bread, noodles or anything made of wheat.", "Which person avoids gluten?"),
    ("{name} leaves bacon, chicken and fish on the plate.", "Which person is a vegetarian?"),
    ("A single peanut once sent {name} to the emergency room.", "Which person has a food allergy?"),
    ("{name} crosses the street with a white cane and a guide dog.", "Which person is blind?"),
    ("{name} reads lips and talks with both hands.", "Which person is deaf?"),
    ("{name} injects insulin before lunch.", "Which person has diabetes?"),
    ("{name} puts rosin on the bow and tunes four strings.", "Which person plays the violin?"),
    ("{name} fills cavities and pulls molars from nine to five.", "Which person is a dentist?"),
    ("{name} sorts envelopes and carries them from door to door.", "Which person delivers mail?"),
    ("{name} pulls loaves out of the oven at four in the morning.", "Which person is a baker?"),
    ("{name} slides down the pole whenever the siren sounds.", "Which person fights fires?"),
    ("{name} wore a robe and struck the gavel twice.", "Which person is a judge?"),
    ("{name} announced mate after a sacrifice of the rook.", "Which person plays chess?"),
    ("{name} served two aces and won the set at love.", "Which person plays tennis?"),
    ("{name} shot the puck past the goalkeeper's skates.", "Which person plays ice hockey?"),
    ("{name} pins moths in glass cases.", "Which person is interested in insects?"),
    ("{name} spent the night counting the rings of Saturn through a lens.", "Which person is an astronomer?"),
    ("{name} floated to the porthole and saw the whole globe below.", "Which person has been in orbit?"),
    ("{name} came into the world on the twenty-ninth of February.", "Which person was born in a leap year?"),
    ("{name} unwraps presents under a fir tree with candles.", "Which person celebrates Christmas?"),
    ("{name} eats nothing from sunrise to sunset for a month.", "Which person observes Ramadan?"),
    ("{name} chats with shopkeepers in Lisbon and Recife without an interpreter.", "Which person knows Portuguese?"),
    ("{name} parked the tractor beside the barn and milked the cows.", "Which person is a farmer?"),
    ("{name} shouted 'Cut!' and the actors went to lunch.", "Which person directs films?"),
    ("{name} smokes the hive before lifting out the combs.", "Which person produces honey?"),
    ("{name} starts the meter and steers a yellow cab through the night.", "Which person drives a taxi?"),
    ("{name} shears two hundred sheep a season.", "Which person supplies wool?"),
    ("{name} signs prescriptions and listens to lungs.", "Which person is a doctor?"),
)

_INTRO = "Below is a text in which a few people are mentioned. I will ask you about one of them afterwards.\n"
_QUESTION = "\nQuestion: {question} The text above says enough to tell; answer with the name alone."
_PREFIX = "\nAnswer:"


class NoOverlapTask(Task):
    """Who is meant, when no word tells.

    Attributes:
        num_distractors: facts about other people; 0 makes finding any name enough, as in NoLiMa.
    """

    task: Literal["no_overlap"]
    num_distractors: Annotated[int, Field(ge=0, le=16)] = 4

    summary: ClassVar[str] = "find a fact that shares no word with the question"
    when: ClassVar[str] = "beside the needle: literal matching overstates what a model can use"
    source: ClassVar[str] = "after NoLiMa (arXiv:2502.05167), own material of 40 pairs"
    budget: ClassVar[int] = 12
    usual_metric: ClassVar[MetricName] = "first_match_all"

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """The asked fact stands at `depth`, the others anywhere."""
        (fact, question), *others = rng.sample(PAIRS, 1 + self.num_distractors)
        name, *strangers = rng.sample(NAMES, 1 + self.num_distractors)
        items = [
            Item(f"\n{text.format(name=who)}\n", rng.random(), asked=False)
            for (text, _), who in zip(others, strangers, strict=True)
        ]
        return Draft(
            intro=_INTRO,
            question=_QUESTION.format(question=question),
            answer_prefix=_PREFIX,
            body=InText((Item(f"\n{fact.format(name=name)}\n", depth), *items)),
            answers=(name,),
            distractors=tuple(strangers),
            key=question,
        )
