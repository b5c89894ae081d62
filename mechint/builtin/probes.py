"""What a model trained on the tales knows: prompts with one right next word, by kind of knowledge.

The recipe measures the share of right greedy answers and the card prints it, weak kinds included.
"""

from typing import Any

from mechint.builtin import world


def probes() -> dict[str, list[tuple[str, str]]]:
    """Kind of knowledge -> pairs of a prompt and its right next word."""
    countries, numbers, days, months = world.COUNTRIES, world.NUMBERS, world.WEEKDAYS, world.MONTHS
    towns = [(town, country.name) for country in countries for town in country.cities]
    pets = [("cat", "Milo"), ("dog", "Rex"), ("horse", "Luna"), ("goat", "Pepper")]
    return {
        "capital of a country": [(f"The capital of {c.name} is", c.capital) for c in countries],
        "language of a country": [(f"People in {c.name} speak", c.language) for c in countries],
        "country of a river": [(f"The {c.river} is a river in", c.name) for c in countries],
        "country of a town, in mid-sentence": [(f"From Rome it is far to {town} in", land) for town, land in towns],
        "country of a town that opens the text": [(f"{town} is a city in", land) for town, land in towns],
        "where a job is done": [(f"The {job.name} works in the", job.place) for job in world.JOBS],
        "the next weekday": [(f"If today is {day}, tomorrow will be", days[(i + 1) % 7]) for i, day in enumerate(days)],
        "the month before": [(f"{month} comes after", months[i - 1]) for i, month in enumerate(months)],
        "the opposite": [(f"The opposite of {a} is", b) for a, b in world.OPPOSITES],
        "a sum": [
            (f"{numbers[a].capitalize()} plus {numbers[b]} is", numbers[a + b])
            for a in range(2, 11)
            for b in range(1, 11)
        ],
        "the city a person was said to live in": [
            (f"Paul was a clever doctor who lived in {c.capital}. So he went back to", c.capital) for c in countries
        ],
        "the name a pet was given": [
            (f"{person} has a black {pet} called {name}. The {pet} was called", name)
            for person in ("Paul", "Mary", "Omar")
            for pet, name in pets
        ],
    }


def shares(model: Any, tokenizer: Any) -> dict[str, float]:
    """Share of each kind's prompts whose most likely next token is the right word; BOS stands before each prompt."""
    import torch

    result: dict[str, float] = {}
    with torch.inference_mode():
        for kind, pairs in probes().items():
            right = 0
            for prompt, answer in pairs:
                ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
                word = tokenizer.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
                right += word.strip() == answer
            result[kind] = round(right / len(pairs), 3)
    return result
