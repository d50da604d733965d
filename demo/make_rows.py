"""Make the demo's rows: orders in everyday English, each with its JSON.

python demo/make_rows.py outputs/demo-rows

Writes train.jsonl and held_out.jsonl. They share no item, no name and no wording, so the answers to held-out
rows cannot be remembered from the training.
"""

import json
import random
import sys
from pathlib import Path

TASK = "Write this order as JSON with item, quantity, name, day and service: "
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
AMOUNTS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "a couple of": 2, "half a dozen": 6, "a dozen": 12, "15": 15, "24": 24,
}  # fmt: skip

# An item is a kind and a thing: "red mug".
TRAIN_KINDS = """
    red blue green black golden silver brass copper oak pine cedar paper plastic leather wool silk linen
    garden kitchen office winter summer Danish French Persian little giant round square folding striped
    plain toy antique lemon apple pepper cheese rye vanilla bamboo velour crystal ceramic rubber canvas
""".split()
TRAIN_THINGS = """
    mug plate candle shelf box pie roll loaf bush bulb chair lamp brush bucket blanket scarf belt knife glass
    bowl towel frame handle key pipe screw bag card case ball train tart cake tree jar bottle set clock fork
    kettle ladder hammer ribbon pillow carpet curtain notebook envelope pencil lantern teapot saddle whistle
""".split()
HELD_OUT_KINDS = "yellow wooden plum cotton purple iron cherry straw marble velvet Swiss tiny".split()
HELD_OUT_THINGS = "cup spoon bun shirt pot hook mirror basket hat bench tile rug".split()

TRAIN_NAMES = """
    Anna Ben Carla David Elena Felix Grace Henry Irene Jonas Karim Laura Milan Nadia Oscar Paula Quentin Rosa
    Samuel Tara Umar Vera Walter Ximena Yusuf Zoe Adam Beatrice Carlos Diana Emil Fatima George Hanna Ivan
    Julia Kofi Lena Martin Nora Pedro Ruth Stefan Theresa Victor Wendy Isaac Margaret Denise Edgar Isadora
    Hubert Nigel Bridget Olaf Montgomery Francesca Gretchen Luigi Archibald Jacqueline Clarence Dorothy Ingrid
""".split()
HELD_OUT_NAMES = "Arthur Bruno Clara Dennis Edith Frank Greta Hugo Isabel Jakob Louis Mona Nils Olga".split()

TRAIN_WORDINGS = {
    "pickup": [
        "Hi, this is {name}. I'd like to pick up {order}{day}.",
        "{order} for {name}, to be collected{day}, please.",
        "Could you set aside {order} for {name}? I will come by{day}.",
        "{name} here. Can I collect {order}{day}?",
        "Please keep {order} ready for {name}, who calls in{day}.",
        "I need {order}. The name is {name}, and I'll pick {it} up{day}.",
        "My name is {name}. I want {order} and will fetch {it} myself{day}.",
        "Put {order} on the counter for {name}{day}.",
        "Can I get {order}{day}? Pickup, under the name {name}.",
        "{name} would like {order} and comes to the shop{day}.",
        "I'm {name}. Save {order} for me, I'll be at the store{day}.",
        "Hold back {order}, please: {name} is coming in for {it}{day}.",
        "{name} wants to take {order} home from the shop{day}.",
        "Pack {order} for {name}; I'll stop by and get {it}{day}.",
    ],
    "delivery": [
        "Please deliver {order} to {name}{day}.",
        "Could you send {order} to my house{day}? It's {name}.",
        "{name} needs {order} brought over{day}.",
        "Hello, {name} speaking. Can someone bring me {order}{day}?",
        "I can't come to the shop, so please ship {order}{day}. Name: {name}.",
        "{order} to be delivered{day}, for {name}.",
        "We have run out! Send us {order}{day}, says {name}.",
        "Would you drop {order} at {name}'s door{day}?",
        "{name} is at home{day} and waits for {order}.",
        "Take {order} to {name}'s address{day}.",
        "I'm {name}. Mail {order} to me{day}, please.",
        "Let your driver leave {order} with {name}{day}.",
        "{name} asks whether you could bring {order} to the office{day}.",
        "Ship {order} to {name}{day}; nobody can come in for {it}.",
    ],
}
HELD_OUT_WORDINGS = {
    "pickup": [
        "Good morning, {name} again! I'd love {order} and will come and get {it}{day}.",
        "It's {name}. Please keep {order} at the till for me, I'll call in{day}.",
        "Reserve {order} in the name of {name}; I'm picking {it} up{day}.",
    ],
    "delivery": [
        "For {name}: {order}, delivered{day} if that's all right.",
        "Can your van bring {order} round to {name}{day}?",
        "Please have {order} sent over to {name}{day}.",
    ],
}


def make_row(rng: random.Random, kinds, things, names, wordings: dict[str, list[str]]) -> dict:
    """A row of messages: an order to write as JSON, and the JSON."""
    item, name = f"{rng.choice(kinds)} {rng.choice(things)}", rng.choice(names)
    day, service = rng.choice([None, *DAYS]), rng.choice(list(wordings))
    if rng.random() < 0.2:
        quantity, order, it = 1, f"{'an' if item[0] in 'aeiou' else 'a'} {item}", "it"
    else:
        amount, quantity = rng.choice(list(AMOUNTS.items()))
        order, it = f"{amount} {plural(item)}", "them"
    said_day = rng.choice([" on {}", " this {}", " {} morning"]).format(day) if day else ""
    text = rng.choice(wordings[service]).format(order=order, name=name, day=said_day, it=it)
    answer = {"item": item, "quantity": quantity, "name": name, "day": day, "service": service}
    return {
        "messages": [
            {"role": "user", "content": TASK + text[0].upper() + text[1:]},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def plural(noun: str) -> str:
    """The plural of one of the items above."""
    if noun.endswith(("loaf", "knife", "shelf", "scarf")):
        return noun.removesuffix("e").removesuffix("f") + "ves"
    return noun + "es" if noun.endswith(("sh", "ss", "x", "ch")) else noun + "s"


def main(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, number, values in (
        ("train", 480, (TRAIN_KINDS, TRAIN_THINGS, TRAIN_NAMES, TRAIN_WORDINGS)),
        ("held_out", 60, (HELD_OUT_KINDS, HELD_OUT_THINGS, HELD_OUT_NAMES, HELD_OUT_WORDINGS)),
    ):
        rows = [make_row(rng, *values) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {number} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/make_rows.py FOLDER")
    main(Path(sys.argv[1]))
