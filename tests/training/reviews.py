"""Reviews as people write them, for training the demo's sentiment head and choosing among prompts; none is a held-out line.

Every line was written for this project. Pure data; standard library only.
"""

from __future__ import annotations

POSITIVE = """
I keep coming back to this place, the noodles are that good.
She explained everything patiently and my headache was gone the same day.
My son has not put the puzzle down since his birthday.
The seats are soft, the heating works and we arrived early.
Best pancakes in town, hands down.
After three winters the boots still look like new.
I was sceptical at first, but the app saves me an hour every day.
The choir gave me goosebumps.
They replaced the broken part for free and apologised twice.
Our guide knew every stone and made the children giggle.
A warm, clever story that I will read again.
The tent kept us dry through two nights of rain.
Light, sturdy and it folds in seconds.
I slept like a baby and woke up without back pain.
The dentist was gentle and I felt nothing at all.
It heats up fast and never sticks.
The pharmacist stayed late just to find my medicine.
Everything arrived two days early and nicely wrapped.
What a goal, what a game, what a night!
The teacher made algebra feel like play.
My plants have doubled in size since I switched to this soil.
Quiet engine, low fuel use, lots of room for the dog.
The ending was perfect and I cried happy tears.
I laughed so hard that my sides hurt.
The new menu is a triumph and the dessert was heavenly.
He painted the whole flat in a day and left it spotless.
Clear photos even at night, I am impressed.
This blanket is so cosy that my cat moved in.
The bank clerk solved in five minutes what others could not in weeks.
Great grip, nice colours, and my daughter rides it every day.
The museum was free and full of treasures.
I got the job thanks to this course.
Simple, honest food made with care.
The keyboard feels great and typing is fun again.
The ferry crossing was smooth and the sunset unforgettable.
These headphones cancel the noise of the whole office.
Thank you for the quick reply and the generous refund.
The hike was easy, well marked and ended at a lovely waterfall.
My hair has never been softer.
A fair price for such careful work.
The lawyer was honest and won our case.
The knife is sharp, balanced and a pleasure to hold.
We felt welcome from the first minute.
The orchestra played with such tenderness that nobody dared to breathe.
The update fixed every bug I had reported.
I have recommended this plumber to all my neighbours.
The garden tour was the highlight of our holiday.
Perfect size, perfect weight, perfect present.
The nurse held my hand and made me feel safe.
The soup tasted like my mother used to make it.
My students love the new textbook.
It cleaned the carpet better than any machine I ever rented.
The actors were superb and the music lingers in my head.
Finally shoes that do not hurt after a long shift.
The campsite was clean, green and wonderfully quiet.
The bakery around the corner makes my mornings bright.
Good value, quick to assemble, and it looks lovely in the hall.
I adore the scent, it reminds me of summer.
The repair cost less than they had estimated.
A thrilling match and a friendly crowd.
The crossword is witty and just hard enough.
Our flight left on time and the crew was cheerful.
The printer was running within minutes and has never jammed.
The portrait turned out beautifully and we framed it at once.
The game is charming and I enjoyed every level.
I could hear the difference from the first note.
The water was clear, the sand was white, and we did not want to leave.
The vet saved our rabbit and we will always be grateful.
The lamp gives a soft light and looks elegant.
Smart design and a joy to use in the kitchen.
The lecture was lively and I learned a lot.
The cheese was creamy, the wine was fine, and the host was kind.
"""

NEGATIVE = """
I will never set foot in that shop again.
The soup was salty and the bread was stale.
The screen cracked when I put it down gently on the table.
She kept interrupting me and billed me for the privilege.
The toy fell apart before lunch.
The bus never came and the hotline was dead.
After one wash the shirt was two sizes smaller.
The app drains my phone and shows nothing but adverts.
The singer was drunk and left after three songs.
They lost my parcel and blamed me for it.
Our guide mumbled, hurried and forgot half of the group.
A flat, lazy story with a silly twist.
The tent let the rain in and the poles snapped.
Heavy, clumsy and impossible to fold.
My back hurts every morning since we got this bed.
The dentist drilled the wrong tooth.
Everything sticks to the pan and the handle gets burning hot.
The pharmacist shouted at an old man in front of everyone.
The parcel came a month late with a dent in the middle.
What a shameful defeat, I left before the end.
The teacher reads from the slides and answers no questions.
All my plants died within a week of using this soil.
The engine howls and it drinks fuel like a truck.
The ending was ridiculous and I felt cheated.
Not a single joke landed all night.
The new menu is a mess and the dessert was frozen in the middle.
He painted the door shut and spilled paint on the floor.
Blurry photos even in bright sun, very poor.
The blanket is scratchy and sheds all over the sofa.
The bank kept me on hold for an hour and then hung up.
The brakes failed on the first hill, this bike is dangerous.
The museum was half closed and they still charged full price.
The course taught me nothing and nobody marked my work.
Greasy food served with a sneer.
The keyboard misses every third letter.
The ferry was filthy and everyone was sick.
These headphones hiss and the left side died.
I wrote four times and never got a reply or a refund.
The path was overgrown and ended at a rubbish heap.
My scalp burns and my hair falls out.
A scandalous price for such sloppy work.
The lawyer lied to us and missed the deadline.
The knife was blunt out of the box and rusts.
We felt like intruders from the first minute.
The orchestra was out of tune and the hall was freezing.
The update deleted all of my photos.
The plumber flooded the cellar and vanished.
The tour was the low point of our holiday.
Wrong size, wrong colour, and they refuse to take it back.
The nurse ignored me for hours although I was in pain.
There was a hair in my soup and the manager laughed.
My students hate the new textbook and so do I.
It smeared the dirt around and then the motor burned out.
The actors forgot their lines and the music was deafening.
These shoes gave me blisters within an hour.
The campsite was muddy, loud and full of wasps.
The bakery sold us mouldy rolls.
Flimsy, hard to assemble, and one leg is shorter than the others.
The smell gave me a headache and I threw it away.
The repair cost twice what they had promised and it failed again.
A boring match in front of an angry crowd.
The crossword is full of errors.
Our flight was cancelled and nobody told us why.
The printer jams on every page and eats ink.
The portrait looks nothing like us and they kept the deposit.
The game freezes, the story is dull, and it is full of bugs.
The speakers crackle and the bass is a muddy hum.
The beach was littered with plastic and the water stank.
The vet was careless and our dog suffered for it.
The lamp flickers and smells of burnt plastic.
Bad design, I cut my finger on the lid.
The lecture was a tedious sales pitch.
"""


def reviews() -> list[tuple[str, str]]:
    """(label, line), positive and negative taking turns."""
    pairs = zip(POSITIVE.strip().splitlines(), NEGATIVE.strip().splitlines(), strict=True)
    return [entry for positive, negative in pairs for entry in (("positive", positive), ("negative", negative))]
