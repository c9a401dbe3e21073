"""Prompts of many kinds out of a few texts: what a head has never seen asked, it drafts badly.

    python examples/train_head/compose.py texts.parquet --column text --passages 900 --words 900 --to prompts.parquet
    python examples/train_head/compose.py --lists 900 --to lists.parquet
    python examples/train_head/compose.py 'lists/*.parquet' --column completion --listed 4000 --to prompts.parquet

Each prompt is an instruction about a passage of one of the texts, about words that stand in several of them, or about a
subject of `subjects.txt`; or, with `--tasks`, one about a subject that is put together of parts, so that hardly two are
alike. All are drawn at random, by `--seed`. Or the target asks itself: what answers to `--lists` list, is asked by
`--listed` (as in Self-Instruct, arXiv 2212.10560; sample them at a temperature of 0.8 or so). The table has `id`,
`category` (passage, word, subject, task, list or listed) and `messages`, as a job file's `input` wants them.
The target answers, so nothing of the texts' own style is learned: they only bring in what to speak of.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from pathlib import Path

import polars as pl

ON_PASSAGE = (
    "Summarize the following text in two sentences.",
    "What are the main points of this passage?",
    "Paraphrase the following passage.",
    "Rewrite this passage in a formal tone.",
    "Rewrite the text below as a short poem.",
    "Explain what the following text is about, in words that a child would understand.",
    "Write a short email to a friend about this.",
    "Write a letter to the editor in response to this.",
    "Write three questions that a teacher could ask about this text, and answer them.",
    "What questions does this text leave open?",
    "Who is speaking here, and what do they want? Explain your reasoning.",
    "List all persons, places and things that are named in the text.",
    "Extract the names, dates and numbers in this text and return them as JSON.",
    "Continue this story.",
    "Write the next three sentences.",
    "What could happen next? Describe three possibilities.",
    "Describe the scene below from another person's point of view.",
    "Do you agree with the following? Give reasons for and against.",
    "Which of the statements in this text are facts, and which are opinions?",
    "Suppose the opposite of this were true. What would follow?",
    "Write a blog post introduction on the subject of this note.",
    "Write a headline and a short news report about the following.",
    "Suggest a title and three keywords for the following text.",
    "What is the mood of this paragraph, and which words create it?",
    "Turn the following into a dialogue between two people.",
    "Write a product review inspired by these lines.",
    "What historical, scientific or cultural background would help a reader to understand this?",
    "Correct the grammar of this text where needed and explain your changes.",
    "Give practical advice to the person who wrote this.",
    "Make a bulleted list of what has to be done according to this note.",
    "Classify the following text by topic and tone, and justify your answer.",
    "Explain the reasoning in this passage step by step.",
    "Translate the meaning of this into simple English.",
    "You are a critic. Evaluate the following text on a scale from 1 to 10 and explain your score.",
    "Answer this as an expert would.",
    "Pretend to be the person who says this, and introduce yourself.",
)
ON_WORDS = (
    "Explain what {a} means and why it matters.",
    "Write a short essay about {a}.",
    "Compare {a} and {b}. What do they have in common, and how do they differ?",
    "What is the history of {a}?",
    "Give five facts about {a}.",
    "Describe to a student how {a} works.",
    "How does {a} influence {b}?",
    "Write a short story in which {a} and {b} play a part.",
    "What are common misunderstandings about {a}?",
    "Which ethical questions does {a} raise?",
    "Draft a professional email about {a}.",
    "Plan a lesson about {a} for beginners.",
    "Why do people care about {a}?",
    "What would the world look like without {a}?",
    "Write a travel or product description that mentions {a}.",
    "Give arguments for and against more {a}.",
    "Act as an experienced {a} teacher and tell me what I should learn first.",
    "You are a character from a novel about {a}. Introduce yourself and answer in that voice.",
    "I want to understand the connection between {a} and {b}. Can you help me?",
    "Write a poem of eight lines about {a}.",
    "Write the opening paragraph of a mystery in which {a} is the first clue.",
    "Write a persuasive speech that {a} deserves more attention than {b}.",
    "Compose a cover letter for a job that has to do with {a}.",
    "Write a message to my neighbour about the {a}, friendly but firm.",
    "Make a table that compares {a} with {b} by cost, risk and benefit.",
    "If {a} doubled every year, what would happen to {b} after three years? Think step by step.",
    "A friend says that {a} always leads to {b}. Is that a sound argument? Explain.",
    "What is the difference between {a} and {b}? Give an example of each.",
    "List ten ideas for a workshop on {a}, one line each.",
    "Explain the science behind {a}, with its most important terms.",
    "How did {a} change society, the economy and the arts?",
    "Which three books, films or places should somebody know who is interested in {a}?",
    "Answer in fewer than a hundred words: what makes {a} difficult?",
    "Design an experiment that shows whether {a} has an effect on {b}.",
    "Give step-by-step instructions for somebody who has to prepare {a} for the first time.",
    "What questions would a journalist ask about {a}? Answer two of them.",
    "Write a dialogue between a doctor and a patient who worries about {a}.",
    "Describe {a} vividly, with details for all the senses.",
    "Suggest names and a slogan for a shop that sells {a}.",
    "What are the advantages and disadvantages of {a} for a small company?",
    "Write a business plan outline around {a} and {b}.",
    "Tell a joke about {a} and explain why it is funny.",
    "As a historian, describe how people thought about {a} a hundred years ago.",
    "Return three facts about {a} as a JSON list with the fields fact and source.",
    "What does the law usually say about {a}, and what should I ask a lawyer?",
    "How would you measure {a}? Name units, methods and typical errors.",
)
# A task about a subject is a setting, a request and what else is wanted, so that hardly two are alike.
SETTINGS = (
    "I am preparing for an exam.",
    "We discuss this in class tomorrow.",
    "A child asked me about this, and I had no good answer.",
    "You are a tutor for first-year students.",
    "You are a guide in a museum.",
    "You are an engineer who speaks to the public.",
    "Act as an experienced editor.",
    "Pretend that you lived three hundred years ago.",
    "Imagine you are being interviewed on the radio.",
    "Assume the role of a patient teacher.",
    "Speak as a sceptic would.",
    "I work in a small company and know little about this.",
    "My audience are experts.",
    "Suppose that we have ten minutes.",
    "Here is a question that came up at dinner.",
    "You are a poet with a sense of humour.",
    "You are a senior researcher who reviews a paper.",
    "Picture yourself as the mayor of a small town.",
    "Take on the part of a detective from an old film.",
    "I run a blog with many readers.",
    "My manager needs this by tonight.",
    "Our team disagrees about this.",
    "I have read the textbook and still do not see it.",
    "You write for a daily newspaper.",
    "Please help me with my homework.",
)
REQUESTS = (
    "What is {a}, and which parts or steps does it consist of?",
    "Which laws or principles lie behind {a}?",
    "Describe what happens in {a} from beginning to end.",
    "How was {a} first understood?",
    "What role does {a} play in {b}?",
    "What causes {a}, and what follows from it?",
    "Explain the relation between {a} and {b}.",
    "In the study of {a}, which terms are the most important ones? Define them.",
    "How can {a} be recognized, and how can it be measured?",
    "Which problems does {a} solve, and which does it create?",
    "Discuss the significance of {a} in the twentieth century.",
    "What would change if there were no {a}?",
    "Outline the main theories of {a} and how they differ.",
    "Give an overview of {a} for somebody who knows {b}.",
    "Why is {a} so often confused with {b}?",
    "Which of the two matters more, {a} or {b}, and why?",
    "Name three well-known examples of {a} and say what they have in common.",
    "Walk me through a typical problem about {a} and its solution.",
    "What do critics say about {a}, and are they right?",
    "How has {a} changed over time?",
    "Summarize what is known about {a}.",
    "Which factors should one consider when deciding about {a}?",
    "How are {a} and {b} treated differently in different countries?",
    "Develop a plan for a research project on {a}.",
    "Write an engaging introduction to a chapter about {a}.",
    "Write a short scene in which somebody explains {a}.",
    "Compose a few lines of verse about {a}.",
    "Draft a letter to a friend about {a}.",
    "Write a review of a book about {a}.",
    "Describe a character whose life is changed by {a}.",
    "Write a headline and the first paragraph of an article about {a}.",
    "Suggest a metaphor for {a} and explain it.",
    "Prepare five quiz questions about {a} with short answers.",
    "Sort these into groups and justify your choice: {a}, {b}, {c}.",
    "Fill a table with one row each for {a}, {b} and {c}: what it is, who uses it, what it costs.",
    "Someone claims that {a} is the same as {b}. Refute or support the claim.",
    "If {a} is needed for {b}, and there is no {b}, what can we conclude about {a}? Explain the logic.",
    "A group of {n} people wants to learn about {a}, each in {m} hours. How should they divide the work?",
    "One book about {a} costs {n} dollars, and one about {b} costs {m} dollars. What do three of each cost?",
    "Implement a small program that has to do with {a}, and describe how it works.",
    "Craft an advertisement for a course about {a}.",
    "Write an email to a colleague who asked for your opinion of {a}.",
    "Write a diary entry of somebody who has just discovered {a}.",
    "Begin a story with a sentence about {a} that makes one want to read on.",
    "Write an opinion piece on {a} and its effects on ordinary people.",
    "Write a limerick or a haiku about {a}.",
    "Write a speech for the opening of an exhibition on {a}.",
    "Compose a short play in which {a} and {b} are the subject of a quarrel.",
    "Write a guide for visitors who come because of {a}, with places to see and things to do.",
    "Write a proposal to a foundation that could pay for work on {a}.",
    "Describe {a} as a painter would describe a picture.",
    'Edit this sentence and explain your edits: "{a} are been important for {b} since many year."',
    "Turn these notes into one paragraph: {a}; {b}; {c}; why it matters; what to do next.",
    "Write a list of {m} instructions for a game about {a}.",
    "Answer as if you were {a} and could speak.",
    "Give me three different ways to explain {a}, and say which is best.",
    'Extract the subjects from this sentence as a JSON list: "First {a}, then {b}, and at last {c}."',
    'Count the words in "{a}, {b} and {c}", and put them in alphabetical order.',
    "Rank {a}, {b} and {c} by how hard they are to learn, and explain the order.",
    "There are {n} books on a shelf; {m} are about {a} and the rest about {b}. How many are those? Explain each step.",
    "A train with {n} students of {a} stops {m} times, and two get off at each stop. How many are left?",
    "Solve this: x plus {m} is {n}. Then explain how equations like this turn up in {a}.",
    "What would an economist, a physicist and a poet each say about {a}?",
    "What are the stages of {a}, and how long does each take?",
    "State the most important equation or rule for {a}, explain each symbol or word in it, and apply it once.",
    "What are the chemical, physical or biological foundations of {a}?",
    "Describe how {a} is made or arises, and what can go wrong.",
    "What is the connection of {a} to energy, matter or life?",
    "How do scientists study {a}, and which instruments do they use?",
    "What is the evidence for {a}, and how strong is it?",
    "Compare the views of two schools of thought on {a}.",
    "What were the social and political consequences of {a}?",
    "Which methods can be used to teach {a}, and how do they compare with those for {b}?",
    "How would you explain to a court what {a} is?",
    "Assess the arguments for regulating {a}.",
    "What should a government do about {a}, and what should it leave alone?",
    "Write the script of a short video about {a}: what is said and what is seen.",
    "Write a farewell letter of somebody who leaves {a} behind for {b}.",
    "Tell the story of {a} as a fairy tale, beginning with an unusual first sentence.",
    "Write a polite complaint about a course on {a} that had nothing to do with {b}.",
    "Describe a place where {a} can be seen, heard and smelled.",
    "Write a text for the back cover of a novel about {a}.",
    "Portray two people who think differently of {a}, in a paragraph each.",
    "Make this sentence better and say what you changed: we was talking on {a} because {b} have not yet came.",
    "Write an invitation to an evening about {a}, with time, place and programme.",
    "Write a message in which you decline an offer to write about {a}, and recommend somebody else.",
    "Explain {a} on the level of atoms, of bodies and of societies, as far as it applies.",
    "Which quantities determine {a}, and how do they depend on each other?",
    "What goes in, what comes out, and what happens in between, when we speak of {a}?",
    "How would you test a hypothesis about {a}? Name the variables and the controls.",
    "Which mechanism explains {a}, and which experiment has shown it?",
    "What are the two or three types of {a}, and how does one tell them apart?",
    "What is the role of temperature, pressure, time or money in {a}?",
    "Describe a safe structure, procedure or device for {a}, and the requirements it has to meet.",
    "You are {a} come to life. Argue with {b} about who is more useful.",
    "You are a machine that has learned everything about {a}. How do you feel about human beings?",
    "Play a famous person who knew {a} well, and answer a question from the audience about {b}.",
    "Of {n} people, {m} know {a} and half of the others know {b}. How many know neither? Show how you reason.",
    "Anna likes {a} more than Ben does, and Ben likes it more than Carl. Who likes it least? Explain in one sentence.",
    "Which word does not belong with the others: {a}, {b}, {c}, umbrella? Say why.",
    "The sides of a field where {a} is studied measure {n} and {m} meters. How large is it, and how long its fence?",
    "Find the names of subjects in this line and count each: {a}, {b}, {a}, {c}, {b}, {a}.",
    "Say how good each of these reviews finds it, from 1 to 5: 'The talk on {a} was superb.' 'Nothing new on {b}.'",
    "Return as CSV with the columns name, field and year: three discoveries in {a}.",
    "Provide insights into the connection between {a} and {b}, from the view of a historian and of an economist.",
    "What are the most common indicators of {a}, and how do they behave when {b} grows?",
    "Give a lesson plan that connects {a} with {b} over three days.",
    "How do {a} and {b} shape what people think is right?",
)
WISHES = (
    "Who described it first, and when?",
    "Give one example from everyday life.",
    "Which assumptions does your answer rest on?",
    "What follows from that in practice?",
    "Use no more than two paragraphs.",
    "Include numbers and units where you can.",
    "Answer as a numbered list.",
    "End with a question to the reader.",
    "Begin with a definition.",
    "Use simple words only.",
    "Mention at least one exception.",
    "Name the persons who matter here.",
    "Be specific and avoid general phrases.",
    "Add a short conclusion.",
    "How certain is this?",
    "Compare with what people believed before.",
    "Write about two hundred words.",
    "Use technical terms and define each.",
    "What are the limits of this?",
    "Make it vivid, with details for the senses.",
    "Keep it formal.",
    "Use headings.",
    "Think step by step.",
    "What should I read next?",
    "Choose the words with care.",
    "Let every sentence begin with a different letter.",
    "Give two examples and one counterexample.",
    "Say what is often forgotten.",
    "Explain how the parts work together.",
    "Which of these points is the weakest?",
    "Write it so that it can be read aloud.",
    "Support each point with a reason.",
    "How has this been applied?",
    "Describe it in chronological order.",
    "Discuss how this affects people's lives.",
    "Limit yourself to five sentences.",
    "Be creative, and keep it short.",
    "Give both sides the same room.",
    "Explain it to a ten-year-old and then to an expert.",
    "Your answer should not need any other source.",
    "Name the evidence for each claim.",
    "Please avoid lists.",
    "Use a comparison with cooking, sports or music.",
    "Say also what the result would be if one number or condition changed.",
)
LISTS = (
    "Write five exam questions about {a}, from easy to hard, one per line, without answers.",
    "Write five detailed requests that people send to an assistant about {a}, one per line.",
    "Write five questions of two or three sentences each about {a}, numbered. Name persons, places or numbers in them.",
    "Write five problems with numbers that have to do with {a}, one per line, without solutions.",
    "Write five writing tasks about {a}, one per line: an essay, a letter, a story, a speech and a review.",
    "Write five instructions for an expert on {a}, one per line. Each asks for an explanation and an example.",
)
# An item of a numbered or dotted list: long enough to be asked, and ended, so that the last one is not a cut-off one.
ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+(.{25,400}[.?!])[\"\u201d*]*\s*$", re.MULTILINE)
# Small models list much else than questions and tasks, and leave blanks in brackets.
ASKS = re.compile(
    r"^(?!.*\[)(?:.*\?$|(?:Analyze|Calculate|Compare|Create|Define|Describe|Design|Develop|Discuss|Explain|Find|Give|"
    r"Identify|List|Name|Outline|Provide|Tell|Write)\b)"
)
SUBJECTS = Path(__file__).with_name("subjects.txt")
# Shares of tasks that have a setting, and that want something else.
HOW_MANY = (0.3, 0.7)
# Characters of a passage; a sentence that begins within them is kept to its end.
LENGTHS = (120, 220, 380)
# In how many of the texts a word stands, and what hardly any thing's name ends with.
SEVERAL, NOT_NAMES = 3, ("ly", "ing", "ed")


def passage(text: str, length: int, dice: random.Random) -> str:
    """Some sentences of `text`, from a random one on."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    chosen = ""
    for sentence in sentences[dice.randrange(max(1, len(sentences) - 1)) :]:
        if len(chosen) >= length:
            break
        chosen = f"{chosen} {sentence}".strip()
    return chosen[: 2 * length]


def listed(texts: list[str], num: int, dice: random.Random) -> list[str]:
    """`num` different items of the lists in `texts`, or all where there are fewer."""
    found = {item.strip('*"\u201c\u201d ') for text in texts for item in ITEM.findall(text)}
    items = sorted(item for item in found if ASKS.search(item))
    return dice.sample(items, min(num, len(items)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("texts", nargs="?", help="a Parquet table; lists and subjects need none")
    options.add_argument("--column", default="text", help="its column of texts")
    options.add_argument("--passages", type=int, default=0, help="how many prompts about a passage")
    options.add_argument("--words", type=int, default=0, help="how many prompts about words")
    options.add_argument("--subjects", type=int, default=0, help="how many prompts about a subject")
    options.add_argument("--tasks", type=int, default=0, help="how many tasks about subjects, put together of parts")
    options.add_argument("--lists", type=int, default=0, help="how many prompts for lists of questions about a subject")
    options.add_argument("--listed", type=int, default=0, help="how many of the questions that the texts list")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--to", type=Path, required=True, help="the table of prompts")
    args = options.parse_args()
    dice = random.Random(args.seed)  # noqa: S311  # no secret
    if args.texts is None and (args.passages or args.words or args.listed):
        options.error("passages, words and listed prompts come from texts: name a Parquet table of them")
    texts = [text for text in pl.read_parquet(args.texts)[args.column].to_list() if text] if args.texts else []
    found = Counter(word for text in texts for word in set(re.findall(r"\b[a-z]{6,13}\b", text)))
    names = sorted(word for word, num in found.items() if num >= SEVERAL and not word.endswith(NOT_NAMES))

    subjects = SUBJECTS.read_text().splitlines()

    def on_passage() -> str:
        return f"{dice.choice(ON_PASSAGE)}\n\n{passage(dice.choice(texts), dice.choice(LENGTHS), dice)}"

    def on(words: list[str], asked: tuple[str, ...] = ON_WORDS) -> str:
        a, b, c = dice.choices(words, k=3)
        return dice.choice(asked).format(a=a, b=b, c=c, n=dice.randrange(20, 60), m=dice.randrange(2, 20))

    def task() -> str:
        parts = [dice.choice(SETTINGS)] if dice.random() < HOW_MANY[0] else []
        parts.append(on(subjects, REQUESTS))
        parts += [dice.choice(WISHES)] if dice.random() < HOW_MANY[1] else []
        return " ".join(parts)

    asked = [("passage", on_passage()) for _ in range(args.passages)]
    asked += [("word", on(names)) for _ in range(args.words)]
    asked += [("subject", on(subjects)) for _ in range(args.subjects)]
    asked += [("task", task()) for _ in range(args.tasks)]
    asked += [("list", dice.choice(LISTS).format(a=dice.choice(subjects))) for _ in range(args.lists)]
    asked += [("listed", item) for item in listed(texts, args.listed, dice)]
    dice.shuffle(asked)
    rows = [
        {"id": f"{args.seed}-{i}", "category": kind, "messages": [{"role": "user", "content": text}]}
        for i, (kind, text) in enumerate(asked)
    ]
    pl.DataFrame(rows).write_parquet(args.to)


if __name__ == "__main__":
    main()
