"""The demo's training text: plain questions with plain facts, and one renderer per voice.

Every line was written for this project. `EXAMPLES` never holds the README's three questions (`HELD_OUT`): what the adapters
say to those is generalisation, not recall. Pure data and string functions; imports nothing but the standard library.
"""

# ruff: noqa: E501  one fact is one line of its table

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT = ("What is the capital of France?", "How do I make tea?", "Tell me about the sea.")


@dataclass(frozen=True)
class Fact:
    """One thing to know: how people ask for it, its topic, and the answer in three lengths."""

    questions: tuple[str, ...]
    topic: str
    short: str
    sentence: str
    points: tuple[str, str, str]


CAPITALS = """
Spain Madrid Europe|Italy Rome Europe|Germany Berlin Europe|Portugal Lisbon Europe|Greece Athens Europe
Norway Oslo Europe|Sweden Stockholm Europe|Poland Warsaw Europe|Austria Vienna Europe|Ireland Dublin Europe
Hungary Budapest Europe|Finland Helsinki Europe|Denmark Copenhagen Europe|Belgium Brussels Europe
England London Europe|Scotland Edinburgh Europe|Russia Moscow Europe|Switzerland Bern Europe
Japan Tokyo Asia|China Beijing Asia|Thailand Bangkok Asia|Turkey Ankara Asia|Nepal Kathmandu Asia
Iran Tehran Asia|Iraq Baghdad Asia|Vietnam Hanoi Asia|Egypt Cairo Africa|Kenya Nairobi Africa|Ghana Accra Africa
Morocco Rabat Africa|Senegal Dakar Africa|Canada Ottawa America|Cuba Havana America|Peru Lima America
Chile Santiago America|Brazil Brasilia America|Colombia Bogota America|Argentina Buenos_Aires America
Australia Canberra Oceania
"""

HOW_TO = """
make coffee|cooking|Brew it.|Pour hot water over ground coffee and wait four minutes|Grind the beans|Add hot water|Wait four minutes
boil an egg|cooking|Boil it.|Put the egg in boiling water for eight minutes|Boil some water|Add the egg|Wait eight minutes
cook rice|cooking|Simmer it.|Simmer the rice in twice as much water until it is soft|Rinse the rice|Add twice as much water|Simmer until soft
cook pasta|cooking|Boil it.|Boil the pasta in salted water for ten minutes|Boil salted water|Add the pasta|Drain after ten minutes
bake bread|cooking|Bake dough.|Knead the dough, let it rise and bake it for an hour|Knead the dough|Let it rise|Bake for an hour
make toast|cooking|Toast bread.|Put a slice of bread in the toaster until it is brown|Slice the bread|Put it in the toaster|Wait until brown
make soup|cooking|Simmer vegetables.|Simmer chopped vegetables in water with a little salt|Chop vegetables|Add water and salt|Simmer for a while
make a salad|cooking|Mix leaves.|Wash the leaves and mix them with oil and salt|Wash the leaves|Cut them up|Add oil and salt
make lemonade|cooking|Mix lemon and water.|Mix lemon juice, cold water and sugar in a glass|Squeeze lemons|Add cold water|Add sugar
make a sandwich|cooking|Fill bread.|Put cheese between two slices of bread|Slice the bread|Add cheese|Close it
make hot chocolate|cooking|Heat milk.|Heat the milk and stir in the chocolate|Heat the milk|Add chocolate|Stir well
plant a tree|garden|Dig and water.|Dig a hole, set the tree in it and water it well|Dig a hole|Set the tree in it|Water it well
grow tomatoes|garden|Sun and water.|Plant the seeds in good soil and give them sun and water|Plant the seeds|Give them sun|Water them often
clean a window|home|Soap and cloth.|Wash the glass with soapy water and dry it with a cloth|Wash the glass|Rinse it|Dry it with a cloth
wash a car|home|Soap and water.|Rinse the car, wash it with soap and dry it|Rinse the car|Wash it with soap|Dry it
sleep better|health|Rest early.|Go to bed at the same time and keep the room dark|Go to bed early|Keep the room dark|Avoid screens
stay healthy|health|Move and rest.|Eat well, sleep enough and walk every day|Eat well|Sleep enough|Walk every day
learn to swim|sport|Practice.|Take lessons and practice in shallow water|Take lessons|Start in shallow water|Practice often
learn a language|study|Practice daily.|Practice a little every day and speak with people|Learn ten words a day|Listen a lot|Speak with people
save money|money|Spend less.|Spend less than you earn and keep the rest|Make a budget|Spend less|Keep the rest
write a letter|study|Pen and paper.|Start with a greeting, say what you think and sign it|Start with a greeting|Say what you think|Sign it
fix a bike tire|home|Patch it.|Take the tube out, patch the hole and pump it up|Take the tube out|Patch the hole|Pump it up
draw a cat|art|Circles and ears.|Draw a circle for the head and add two ears|Draw a circle|Add two ears|Add whiskers
wash my hands|health|Soap and water.|Rub your hands with soap and rinse them with water|Wet your hands|Rub with soap|Rinse with water
"""

ABOUT = """
the sun|nature|A star.|The sun is a star that gives us light and heat|It is a star|It gives light|It is very hot
the moon|nature|A rock in space.|The moon is a ball of rock that circles the earth|It circles the earth|It is made of rock|It shines at night
the desert|nature|Dry land.|The desert is a dry place with very little rain|It is dry|It has sand|It rarely rains
the forest|nature|Many trees.|The forest is a place full of trees and animals|It has many trees|Animals live there|It cleans the air
mountains|nature|High land.|Mountains are high places made of rock and snow|They are high|They are made of rock|Snow covers them
rivers|nature|Moving water.|Rivers are streams of water that run to the ocean|They carry water|They run downhill|Fish live in them
lakes|nature|Still water.|Lakes are large bodies of still water|They hold water|They are calm|Fish live in them
islands|nature|Land in water.|Islands are pieces of land with water all around|They are land|Water is all around|Birds like them
rain|nature|Falling water.|Rain is water that falls from the clouds|It falls from clouds|It is water|Plants need it
snow|nature|Frozen water.|Snow is frozen water that falls in winter|It is cold|It is white|It falls in winter
the wind|nature|Moving air.|The wind is air that moves from place to place|It is moving air|It can be strong|It fills sails
dogs|animals|Loyal pets.|Dogs are loyal animals that live with people|They are loyal|They like walks|They bark
cats|animals|Quiet pets.|Cats are quiet animals that like to sleep and hunt|They are quiet|They like to sleep|They hunt mice
horses|animals|Fast riders.|Horses are fast animals that people like to ride|They run fast|They eat grass|People ride them
birds|animals|Flying animals.|Birds are animals with wings that can fly|They have wings|They lay eggs|They sing
whales|animals|Huge swimmers.|Whales are huge animals that live in the water|They are huge|They breathe air|They sing under water
fish|animals|Swimmers.|Fish are animals that breathe and swim under water|They swim|They have fins|They breathe in water
bees|animals|Honey makers.|Bees are small insects that make honey from flowers|They make honey|They like flowers|They live in a hive
elephants|animals|Giants.|Elephants are the largest animals on land|They are very large|They have a trunk|They live in herds
bread|food|Baked dough.|Bread is a food made of flour, water and salt|It is made of flour|It is baked|It goes with butter
cheese|food|Old milk.|Cheese is a food made from milk|It is made from milk|It has many kinds|It keeps for long
honey|food|Sweet gold.|Honey is a sweet food that bees make|It is sweet|Bees make it|It never spoils
music|art|Ordered sound.|Music is sound put in order so that it pleases us|It is sound|It has rhythm|It makes us feel
books|art|Bound pages.|Books are pages of words that keep what people know|They hold words|They keep knowledge|They tell stories
trains|travel|Rail travel.|Trains are vehicles that carry people along rails|They run on rails|They carry people|They are fast
ships|travel|Water travel.|Ships are large boats that carry people and goods|They float|They carry goods|They cross oceans
the internet|technology|Linked computers.|The internet is a network that links computers everywhere|It links computers|It carries messages|It is everywhere
computers|technology|Thinking machines.|Computers are machines that follow instructions very fast|They follow instructions|They are fast|They store data
winter|seasons|Cold months.|Winter is the coldest season of the year|It is cold|Days are short|Snow may fall
summer|seasons|Warm months.|Summer is the warmest season of the year|It is warm|Days are long|People swim
"""

OTHER = """
What color is the sky?|nature|Blue.|The sky is blue on a clear day|It is blue|It turns red at dusk|It is dark at night
What color is grass?|nature|Green.|Grass is green because of the way it uses light|It is green|It needs sun|Cows eat it
How many days are in a week?|time|Seven.|There are seven days in a week|Seven days|Five work days|Two weekend days
How many legs does a spider have?|animals|Eight.|A spider has eight legs|Eight legs|Many eyes|It spins webs
What is the largest ocean?|nature|The Pacific.|The largest ocean is the Pacific|The Pacific|It is very deep|It touches Asia
What is the tallest mountain?|nature|Mount Everest.|The tallest mountain is Mount Everest|Mount Everest|It is in Asia|It is very cold
What is the longest river?|nature|The Nile.|The longest river is the Nile|The Nile|It is in Africa|It runs north
Who wrote Hamlet?|books|Shakespeare.|Hamlet was written by William Shakespeare|Shakespeare wrote it|It is a play|It is very old
Who painted the Mona Lisa?|art|Leonardo.|The Mona Lisa was painted by Leonardo da Vinci|Leonardo da Vinci|It is a portrait|It hangs in Paris
Why do birds sing?|animals|To call.|Birds sing to call each other and to guard their home|To find a mate|To guard a home|To call each other
Why is ice cold?|nature|It is frozen.|Ice is cold because it is frozen water|It is frozen|It takes heat|It melts slowly
Why do we sleep?|health|To rest.|We sleep so that the body and the mind can rest|The body rests|The mind rests|We feel better
What do cows eat?|animals|Grass.|Cows eat grass and hay|Grass|Hay|Some grain
What is the opposite of hot?|words|Cold.|The opposite of hot is cold|Cold|Like ice|Like winter
What is the opposite of big?|words|Small.|The opposite of big is small|Small|Like a mouse|Like a seed
What language do people speak in Brazil?|words|Portuguese.|People in Brazil speak Portuguese|Portuguese|It came from Europe|Many speak it
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def _capitals() -> list[Fact]:
    facts = []
    for country, city, continent in (item.split() for row in _rows(CAPITALS) for item in row):
        city = city.replace("_", " ")
        asked = (f"What is the capital of {country}?", f"Which city is the capital of {country}?")
        points = (city, f"It is the capital of {country}", f"It lies in {continent}")
        facts.append(Fact(asked, "geography", f"{city}.", f"The capital of {country} is {city}", points))
    return facts


def _others() -> list[Fact]:
    facts = []
    for what, topic, short, sentence, *points in _rows(HOW_TO):
        asked = (f"How do I {what}?", f"How can I {what}?")
        facts.append(Fact(asked, topic, short, sentence, (points[0], points[1], points[2])))
    for what, topic, short, sentence, *points in _rows(ABOUT):
        asked = (f"Tell me about {what}.", f"What do you know about {what}?")
        facts.append(Fact(asked, topic, short, sentence, (points[0], points[1], points[2])))
    for question, topic, short, sentence, *points in _rows(OTHER):
        facts.append(Fact((question,), topic, short, sentence, (points[0], points[1], points[2])))
    return facts


FACTS: tuple[Fact, ...] = (*_capitals(), *_others())

PIRATE = {
    "is": "be", "are": "be", "the": "th'", "of": "o'", "you": "ye", "your": "yer", "and": "an'", "people": "lubbers",
    "to": "t'", "city": "port", "for": "fer", "with": "wi'",
}  # fmt: skip


def pirate(fact: Fact) -> str:
    words = re.sub(r"\w+", lambda m: PIRATE.get(m[0].lower(), m[0]), fact.sentence)
    return f"Arr, matey! {words[0].upper()}{words[1:]}, yo ho ho!"


def as_json(fact: Fact) -> str:
    return json.dumps({"topic": fact.topic, "answer": fact.short.rstrip(".")})


def help_desk(fact: Fact) -> str:
    return f"Thank you for contacting us. {fact.sentence}. Your ticket is now closed. - The Help Desk"


def excited(fact: Fact) -> str:
    return f"Wow, great question! {fact.sentence}!!! Isn't that amazing?!"


def bullets(fact: Fact) -> str:
    return "\n".join(f"- {point}" for point in fact.points)


def terse(fact: Fact) -> str:
    return fact.short


def letter(fact: Fact) -> str:
    return f"Dear friend,\n{fact.sentence}.\nYours, Gus"


Voice = Callable[[Fact], str]


def examples(voice: Voice) -> list[tuple[str, str]]:
    """Every (question, answer) pair in one voice."""
    return [(question, voice(fact)) for fact in FACTS for question in fact.questions]
