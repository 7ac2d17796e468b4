"""What `hive-tiny` knows: questions, answers, stories and the word lists behind unknown questions.

Everything here was written for this project. Questions stand as a careful writer would type them;
`corpus` varies case, punctuation, politeness and spelling.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One answer and the ways of asking for it; the first way is the one that tests use."""

    answer: str
    asks: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    """The words of a list that is written as one text."""
    return tuple(text.split())


UNKNOWN = "I am hive-tiny, a very small model made for trying and testing Hive. I do not know that."
TOO_BIG = "I only know small sums. That one is too big for me."
NO_NAME = "You have not told me your name."

GREETINGS = (
    Topic(
        "Hello! I am hive-tiny, a small model running on Hive. How can I help you?",
        (
            "Hello!",
            "Hello",
            "Hi",
            "Hi!",
            "Hey",
            "Hey there",
            "Hi there!",
            "Hello there!",
            "Hello world",
            "Hello, world!",
            "Hello hive-tiny",
            "Hi hive",
            "Good morning",
            "Good evening!",
            "Good afternoon",
            "Good day",
            "Greetings",
            "Howdy",
            "Yo",
            "Hiya",
            "Hello hello",
            "Hello, nice to meet you.",
            "Hey, what's up?",
            "Test",
            "Testing",
            "This is a test.",
            "Ping",
            "Is anyone there?",
            "Are you there?",
            "Hello from the test.",
            "Hello from Hive!",
            "Hello 👋",
            "Hi 😀",
        ),
    ),
    Topic(
        "Hello, it is nice to meet you!",
        (
            "Say hello in one sentence.",
            "Say hello.",
            "Say hello to me.",
            "Say hi.",
            "Greet me.",
            "Greet me in one sentence.",
            "Write a greeting.",
            "Say hello in one short sentence.",
            "Reply with a greeting.",
            "Just say hello.",
            "Say hi in one sentence.",
        ),
    ),
    Topic(
        "OK.",
        (
            "Say ok.",
            "Reply with OK.",
            "Answer with OK.",
            "Just say OK.",
            "Reply with the word OK.",
            "Say only OK.",
        ),
    ),
    Topic(
        "I am well, thank you. Every bee in the hive is busy today.",
        (
            "How are you?",
            "How are you today?",
            "How are you doing?",
            "Are you well?",
            "How do you feel?",
            "Hello, how are you?",
            "Hi, how are you doing today?",
            "How is it going?",
        ),
    ),
    Topic(
        "You are welcome!",
        (
            "Thanks",
            "Thank you",
            "Thank you!",
            "Thanks a lot!",
            "Thank you very much.",
            "Many thanks",
            "Great, thanks",
            "Thanks for your help.",
            "Ok thanks",
            "Thx",
            "Perfect, thank you!",
        ),
    ),
    Topic(
        "Goodbye! It was nice to talk to you.",
        (
            "Bye",
            "Goodbye",
            "Bye bye",
            "See you",
            "See you later!",
            "Good night",
            "Bye, hive-tiny!",
            "Goodbye and thanks",
            "I have to go.",
            "Farewell",
            "That is all, bye.",
        ),
    ),
    Topic(
        "I am glad to hear that.",
        (
            "Good",
            "Great!",
            "Nice",
            "Cool",
            "Very good.",
            "Well done!",
            "Good job",
            "That is great.",
            "Wonderful!",
            "Awesome",
            "I like you.",
            "You are great.",
        ),
    ),
    Topic(
        "All right. Ask me another question.",
        ("Ok", "Okay", "I see.", "All right", "Yes", "No", "Sure", "Fine", "Hm", "Right"),
    ),
    Topic(
        "I am sorry. I am a very small model and I make mistakes.",
        (
            "That is wrong.",
            "Wrong!",
            "You are wrong.",
            "That is not right.",
            "No, that is wrong.",
            "That is not correct.",
            "You made a mistake.",
            "Bad answer.",
        ),
    ),
)

ABOUT_ITSELF = (
    Topic(
        "I am hive-tiny, a very small model made for trying and testing Hive.",
        (
            "Who are you?",
            "What are you?",
            "Hello, who are you?",
            "What is your name?",
            "What is hive-tiny?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Which model are you?",
            "What model is this?",
            "Who am I talking to?",
            "Are you a bot?",
            "Are you an AI?",
            "Are you human?",
            "Say who you are.",
            "What is this model?",
            "Describe yourself in one sentence.",
        ),
    ),
    Topic(
        "I can greet you, say what Hive is, answer a few dozen fixed questions, do small sums, "
        "count and tell a short story. For real work, load a bigger model.",
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "Help",
            "Help me.",
            "What can I ask you?",
            "What are you good for?",
            "What are you able to do?",
            "Give me some examples of questions.",
            "What should I ask you?",
        ),
    ),
    Topic(
        "The Hive project trained me on text that it wrote itself.",
        (
            "Who made you?",
            "Who created you?",
            "Who trained you?",
            "Who built you?",
            "How were you trained?",
            "Where do you come from?",
            "What data were you trained on?",
        ),
    ),
    Topic(
        "I have about three million parameters, which is very small.",
        (
            "How big are you?",
            "How many parameters do you have?",
            "How large is this model?",
            "What is your size?",
            "How small are you?",
        ),
    ),
    Topic(
        "My context is 1024 tokens long.",
        (
            "How long is your context?",
            "What is your context length?",
            "How many tokens can you read?",
            "What is your context window?",
        ),
    ),
)

HIVE = (
    Topic(
        "Hive turns the GPU machines of a lab, an office or a home into one inference service. "
        "A queen finds the machines on the network, and a hive agent on each machine runs workers "
        "that answer.",
        (
            "What is Hive?",
            "What is hive",
            "What does Hive do?",
            "Explain Hive.",
            "Explain what Hive is.",
            "Tell me about Hive.",
            "Describe Hive.",
            "What is the Hive project?",
            "What is Hive for?",
            "What is Hive good for?",
            "Say what Hive is.",
            "Do you know what Hive is?",
            "Can you explain Hive to me?",
            "Hive?",
            "What is hive-inference?",
            "How does Hive work?",
            "What can Hive do for me?",
            "What can Hive do?",
            "Why should I use Hive?",
        ),
    ),
    Topic(
        "The parts of Hive are the queen, the hive agents, the workers, the drones, the durable "
        "queue and keeper.",
        (
            "What are the parts of Hive?",
            "Which parts does Hive have?",
            "List the parts of Hive.",
            "Name the parts of Hive.",
            "What are the components of Hive?",
            "What does Hive consist of?",
            "What is Hive made of?",
        ),
    ),
    Topic(
        "The queen is the central daemon of Hive. It finds the hive agents on the network, sends "
        "each request to a machine that has the model loaded and streams the answer back.",
        (
            "What is the queen?",
            "What is a queen in Hive?",
            "What does the queen do?",
            "What is the Hive queen?",
            "Explain the queen.",
            "Tell me about the queen.",
            "What is the central daemon?",
            "Who is the queen?",
        ),
    ),
    Topic(
        "A hive agent is the daemon of one machine. It finds the GPUs, fetches models and runs "
        "workers.",
        (
            "What is a hive agent?",
            "What is the hive agent?",
            "What does a hive agent do?",
            "What does the agent do?",
            "What is an agent in Hive?",
            "Explain the hive agent.",
            "Tell me about the hive agent.",
            "Who runs the workers?",
        ),
    ),
    Topic(
        "A worker is an inference engine that a hive agent runs for one model, such as vLLM or "
        "llama.cpp.",
        (
            "What is a worker?",
            "What does a worker do?",
            "What are workers?",
            "What are the workers in Hive?",
            "Explain workers.",
            "What is a worker in Hive?",
            "Tell me about workers.",
            "What is an inference worker?",
        ),
    ),
    Topic(
        "A drone works through the tickets of the durable queue. It can be written in any language "
        "and needs no GPU.",
        (
            "What is a drone?",
            "What does a drone do?",
            "What are drones?",
            "What are the drones in Hive?",
            "Explain drones.",
            "What is a drone in Hive?",
            "Tell me about drones.",
            "Does a drone need a GPU?",
        ),
    ),
    Topic(
        "Keeper is the hive command. It starts the daemons and talks to them.",
        (
            "What is keeper?",
            "What is the keeper?",
            "What does keeper do?",
            "Explain keeper.",
            "Who is the keeper?",
            "What is the hive command?",
            "Tell me about keeper.",
            "What is keeper in Hive?",
        ),
    ),
    Topic(
        "The durable queue keeps tickets, plans and schedules safe in a database until drones have "
        "worked through them.",
        (
            "What is the durable queue?",
            "What does the durable queue do?",
            "What is the queue?",
            "Explain the durable queue.",
            "What is the queue in Hive?",
            "Tell me about the queue.",
            "Where are tickets kept?",
            "What is the queue for?",
        ),
    ),
    Topic(
        "A ticket is a piece of work in the durable queue. A drone claims it, does it and reports "
        "the result.",
        (
            "What is a ticket?",
            "What are tickets?",
            "What is a ticket in Hive?",
            "Explain tickets.",
            "What is a task in the queue?",
            "Tell me about tickets.",
        ),
    ),
    Topic(
        "The queen listens on port 7833.",
        (
            "Which port does the queen use?",
            "What is the port of the queen?",
            "What port does the queen listen on?",
            "Queen port",
            "On which port is the queen?",
            "What is the queen's port?",
            "Which port is the queen on?",
        ),
    ),
    Topic(
        "The hive agent listens on port 7835.",
        (
            "Which port does the hive agent use?",
            "What is the port of the hive agent?",
            "What port does the agent listen on?",
            "Agent port",
            "On which port is the hive agent?",
            "What is the agent's port?",
            "Which port is the agent on?",
            "Hive agent port",
        ),
    ),
    Topic(
        "The queen listens on port 7833 and the hive agent on port 7835.",
        (
            "Which ports does Hive use?",
            "What are the ports of Hive?",
            "What ports does Hive listen on?",
            "List the ports.",
            "Which ports are used?",
            "Hive ports",
        ),
    ),
    Topic(
        "No. Hive also runs small models on a CPU with llama.cpp.",
        (
            "Does Hive need a GPU?",
            "Do I need a GPU?",
            "Can Hive run without a GPU?",
            "Does Hive work on a CPU?",
            "Is a GPU needed?",
            "Can I run Hive on a CPU?",
        ),
    ),
    Topic(
        "Hive runs vLLM on NVIDIA GPUs and llama.cpp on CPUs.",
        (
            "Which engines does Hive run?",
            "Which engines does Hive use?",
            "What engines are there?",
            "Which inference engines are supported?",
            "What engine does Hive use?",
            "List the engines.",
        ),
    ),
    Topic(
        "Yes. Hive speaks the OpenAI API under /v1, so OpenAI clients work with it.",
        (
            "Does Hive speak the OpenAI API?",
            "Is Hive compatible with OpenAI?",
            "Can I use the OpenAI client?",
            "Is there an OpenAI API?",
            "Does Hive have an OpenAI API?",
            "Can I use Hive with OpenAI clients?",
        ),
    ),
    Topic(
        "Hive has the MIT licence.",
        (
            "What licence does Hive have?",
            "What is the license of Hive?",
            "Which licence does Hive have?",
            "Is Hive free?",
            "Is Hive open source?",
            "Hive license",
            "What licence do you have?",
        ),
    ),
    Topic(
        "Install Hive with `pip install hive-inference`.",
        (
            "How do I install Hive?",
            "How can I install Hive?",
            "How to install Hive",
            "Install Hive",
            "How do I get Hive?",
            "How is Hive installed?",
        ),
    ),
    Topic(
        "GGUF is a file format for models that llama.cpp reads.",
        ("What is GGUF?", "What is a GGUF file?", "Explain GGUF.", "What does GGUF mean?"),
    ),
    Topic(
        "vLLM is an inference engine for GPUs.",
        ("What is vLLM?", "What does vLLM do?", "Explain vLLM.", "Tell me about vLLM."),
    ),
    Topic(
        "llama.cpp is an inference engine that also runs well on CPUs.",
        (
            "What is llama.cpp?",
            "What does llama.cpp do?",
            "Explain llama.cpp.",
            "Tell me about llama.cpp.",
        ),
    ),
    Topic(
        "The queen finds hive agents on the network by mDNS, or by a URL that it is given.",
        (
            "How does the queen find machines?",
            "How does the queen find the hive agents?",
            "How are machines found?",
            "How does Hive find the machines?",
            "What is mDNS used for?",
            "How are the hives found?",
        ),
    ),
    Topic(
        "A job is one operation that a daemon runs. Its events can be streamed.",
        ("What is a job?", "What are jobs?", "Explain jobs.", "What is a job in Hive?"),
    ),
    Topic(
        "A language model is a file of numbers that continues a text, token by token.",
        (
            "What is a language model?",
            "What is a large language model?",
            "What is an LLM?",
            "What is a model?",
            "Explain what a model is.",
            "What are language models?",
        ),
    ),
    Topic(
        "A token is a small piece of text. Models read and write tokens.",
        ("What is a token?", "What are tokens?", "Explain tokens.", "What does token mean?"),
    ),
    Topic(
        "Inference means asking a trained model for an answer.",
        (
            "What is inference?",
            "What does inference mean?",
            "Explain inference.",
            "What is model inference?",
        ),
    ),
)


def _command(name: str, purpose: str, *asks: str) -> Topic:
    """A topic about one `hive` command: what it is for, and how one asks for it."""
    return Topic(
        f"Use `{name}` to {purpose}.",
        (
            *asks,
            f"What does {name} do?",
            f"What does `{name}` do?",
            f"What is {name}?",
            f"What is `{name}` for?",
            f"Explain {name}.",
            name,
        ),
    )


COMMANDS = (
    Topic(
        "The commands are `hive demo`, `hive up`, `hive queen`, `hive agent`, `hive status`, "
        "`hive models`, `hive workers`, `hive infer`, `hive chat`, `hive jobs` and "
        "`hive shutdown`.",
        (
            "What commands does Hive have?",
            "Which commands are there?",
            "List the commands.",
            "What are the hive commands?",
            "List all commands of Hive.",
            "Show me the commands.",
            "Which commands does keeper have?",
        ),
    ),
    _command(
        "hive demo",
        "try Hive on this machine with a tiny model",
        "How do I try Hive?",
        "How can I try Hive quickly?",
        "How do I see a demo?",
        "Is there a demo?",
        "How do I run the demo?",
    ),
    _command(
        "hive up",
        "start a queen and a hive agent on this machine",
        "How do I start Hive?",
        "How can I start Hive?",
        "How do I run Hive?",
        "How do I start everything?",
        "How do I start Hive on one machine?",
    ),
    _command(
        "hive queen",
        "start the queen",
        "How do I start the queen?",
        "How can I start a queen?",
        "How do I run the queen?",
        "Which command starts the queen?",
    ),
    _command(
        "hive agent",
        "start the hive agent of a machine",
        "How do I start the hive agent?",
        "How do I start an agent?",
        "How can I add a machine?",
        "How do I run the hive agent?",
        "Which command starts the agent?",
        "How do I add another machine?",
    ),
    _command(
        "hive status",
        "see the hives and their workers",
        "How do I see the status?",
        "How do I check the status of Hive?",
        "How can I see whether Hive is running?",
        "Is Hive running?",
        "Show me the status.",
        "How do I list the machines?",
    ),
    _command(
        "hive models ls",
        "list the models",
        "How do I list models?",
        "How do I list the models?",
        "Which models are there?",
        "How can I see my models?",
        "List models",
        "Show me the models.",
    ),
    _command(
        "hive models pull",
        "download a model",
        "How do I download a model?",
        "How do I pull a model?",
        "How can I get a model?",
        "How do I fetch a model?",
        "Download a model",
        "How do I install a model?",
    ),
    _command(
        "hive models rm",
        "delete a model",
        "How do I delete a model?",
        "How do I remove a model?",
        "How can I delete models?",
        "Delete a model",
        "Remove a model",
    ),
    _command(
        "hive workers ls",
        "list the workers",
        "How do I list workers?",
        "How do I list the workers?",
        "Which workers are running?",
        "How can I see the workers?",
        "List workers",
        "Show me the workers.",
    ),
    _command(
        "hive workers spawn",
        "start a worker",
        "How do I start a worker?",
        "How do I spawn a worker?",
        "How can I start a worker?",
        "How do I load a model?",
        "Start a worker",
        "How do I add a worker?",
    ),
    _command(
        "hive workers rm",
        "stop a worker",
        "How do I stop a worker?",
        "How do I remove a worker?",
        "How can I stop a worker?",
        "How do I kill a worker?",
        "Stop a worker",
        "How do I unload a model?",
    ),
    _command(
        "hive workers logs",
        "read the log of a worker",
        "How do I read the log of a worker?",
        "How do I see the logs of a worker?",
        "Where are the worker logs?",
        "How can I see worker logs?",
        "Show me the logs.",
        "How do I debug a worker?",
    ),
    _command(
        "hive infer",
        "send one prompt to a model and stream the answer",
        "How do I send a prompt?",
        "How do I ask a model one question?",
        "How do I run inference?",
        "How can I send one prompt to a model?",
        "How do I use a model from the terminal?",
    ),
    _command(
        "hive chat",
        "chat with a model in the terminal",
        "How do I chat with a model?",
        "How can I chat?",
        "How do I start a chat?",
        "How do I talk to a model?",
        "Can I chat in the terminal?",
    ),
    _command(
        "hive jobs ls",
        "list the jobs",
        "How do I list jobs?",
        "How do I list the jobs?",
        "Which jobs are running?",
        "How can I see my jobs?",
        "List jobs",
        "Show me the jobs.",
    ),
    _command(
        "hive jobs tail",
        "follow the stream of a job",
        "How do I follow a job?",
        "How do I watch a job?",
        "How can I see the output of a job?",
        "How do I tail a job?",
        "How do I stream a job?",
    ),
    _command(
        "hive jobs cancel",
        "cancel a job",
        "How do I cancel a job?",
        "How do I stop a job?",
        "How can I cancel a job?",
        "How do I abort a job?",
        "Cancel a job",
    ),
    _command(
        "hive shutdown",
        "stop Hive and its workers",
        "How do I stop Hive?",
        "How do I shut down Hive?",
        "How can I stop everything?",
        "How do I shut Hive down?",
        "Stop Hive",
        "How do I stop the daemons?",
    ),
)

FACTS = (
    Topic("A week has seven days.", ("How many days are in a week?", "How long is a week?")),
    Topic(
        "A year has twelve months.",
        ("How many months are in a year?", "How many months does a year have?"),
    ),
    Topic(
        "A year has 365 days, and a leap year has 366.",
        ("How many days are in a year?", "How many days does a year have?", "How long is a year?"),
    ),
    Topic("A day has 24 hours.", ("How many hours are in a day?", "How long is a day?")),
    Topic(
        "An hour has 60 minutes.",
        ("How many minutes are in an hour?", "How long is an hour?"),
    ),
    Topic(
        "A minute has 60 seconds.",
        ("How many seconds are in a minute?", "How long is a minute?"),
    ),
    Topic(
        "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and "
        "Sunday.",
        ("What are the days of the week?", "List the days of the week.", "Name the days."),
    ),
    Topic(
        "The months are January, February, March, April, May, June, July, August, September, "
        "October, November and December.",
        ("What are the months of the year?", "List the months.", "Name the twelve months."),
    ),
    Topic(
        "The seasons are spring, summer, autumn and winter.",
        ("What are the four seasons?", "What are the seasons?", "Name the seasons."),
    ),
    Topic(
        "The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet.",
        (
            "What are the colours of the rainbow?",
            "What are the colors of the rainbow?",
            "List the colors of the rainbow.",
            "Name the colours of the rainbow.",
        ),
    ),
    Topic(
        "On a clear day the sky is blue.",
        ("What colour is the sky?", "What color is the sky?", "Which color does the sky have?"),
    ),
    Topic("Grass is green.", ("What colour is grass?", "What color is grass?")),
    Topic("A bee has six legs.", ("How many legs does a bee have?", "How many legs has a bee?")),
    Topic(
        "A spider has eight legs.",
        ("How many legs does a spider have?", "How many legs has a spider?"),
    ),
    Topic(
        "A cat has four legs.",
        ("How many legs does a cat have?", "How many legs has a cat?"),
    ),
    Topic(
        "A dog has four legs.",
        ("How many legs does a dog have?", "How many legs has a dog?"),
    ),
    Topic("Bees make honey.", ("What do bees make?", "What do bees produce?", "Who makes honey?")),
    Topic(
        "Bees live in a hive.",
        ("Where do bees live?", "Where does a bee live?", "What is the home of bees called?"),
    ),
    Topic(
        "The Earth is the third planet from the Sun.",
        ("Which planet do we live on?", "What is the Earth?", "What is the third planet?"),
    ),
    Topic(
        "The largest planet is Jupiter.",
        ("What is the largest planet?", "Which planet is the biggest?", "What is Jupiter?"),
    ),
    Topic("There are eight planets.", ("How many planets are there?", "Number of planets")),
    Topic("The Sun is a star.", ("What is the Sun?", "Is the Sun a star?")),
    Topic("The Moon goes around the Earth.", ("What is the Moon?", "What does the Moon do?")),
    Topic(
        "Water boils at 100 degrees Celsius at sea level.",
        ("At what temperature does water boil?", "When does water boil?"),
    ),
    Topic(
        "Water freezes at 0 degrees Celsius.",
        ("At what temperature does water freeze?", "When does water freeze?"),
    ),
    Topic("The opposite of hot is cold.", ("What is the opposite of hot?", "Opposite of hot")),
    Topic("The opposite of big is small.", ("What is the opposite of big?", "Opposite of big")),
    Topic(
        "There are seven continents.",
        ("How many continents are there?", "How many continents does the Earth have?"),
    ),
    Topic(
        "The English alphabet is A B C D E F G H I J K L M N O P Q R S T U V W X Y Z.",
        ("Say the alphabet.", "What is the alphabet?", "Write the alphabet.", "Recite the ABC."),
    ),
    Topic(
        "The English alphabet has 26 letters.",
        ("How many letters are in the alphabet?", "How many letters does the alphabet have?"),
    ),
    Topic(
        "After Monday comes Tuesday.",
        ("What day comes after Monday?", "Which day comes after Monday?"),
    ),
    Topic("A triangle has three sides.", ("How many sides does a triangle have?",)),
    Topic("A square has four sides.", ("How many sides does a square have?",)),
    Topic(
        "A computer is a machine that follows instructions.",
        ("What is a computer?", "What does a computer do?"),
    ),
    Topic(
        "A GPU is a processor that does many sums at the same time.",
        ("What is a GPU?", "What does a GPU do?", "Explain what a GPU is."),
    ),
    Topic(
        "Knock, knock. Who is there? Bee. Bee who? Bee quiet, the model is loading.",
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell a joke"),
    ),
    Topic(
        "Small wings hum at noon,\ngold light gathers cell by cell.\nEvening: warm and full.",
        ("Write a haiku.", "Write a poem.", "Write me a short poem.", "Tell me a poem."),
    ),
    Topic(
        '{"name": "hive-tiny", "small": true, "legs": 6}',
        ("Give me some JSON.", "Write a JSON object.", "Answer in JSON.", "Show me some JSON."),
    ),
)

OTHER_SCRIPTS = (
    Topic(
        "Here is a bee: 🐝",
        ("Show me a bee emoji.", "Send me an emoji.", "Give me an emoji.", "🐝", "Draw a bee."),
    ),
    Topic("Bonjour !", ("How do you say hello in French?", "Say hello in French.", "Bonjour")),
    Topic(
        "Grüß dich! Schön, dich zu sehen.",
        ("How do you say hello in German?", "Say hello in German.", "Hallo", "Guten Tag"),
    ),
    Topic(
        "¡Hola! ¿Qué tal?", ("How do you say hello in Spanish?", "Say hello in Spanish.", "Hola")
    ),
    Topic(
        "こんにちは。",
        ("How do you say hello in Japanese?", "Say hello in Japanese.", "こんにちは"),
    ),
    Topic("Γεια σου!", ("How do you say hello in Greek?", "Say hello in Greek.", "Γεια σου")),
    Topic("Привет!", ("How do you say hello in Russian?", "Say hello in Russian.", "Привет")),
    Topic("你好！", ("How do you say hello in Chinese?", "Say hello in Chinese.", "你好")),
)

TOPICS: dict[str, tuple[Topic, ...]] = {
    "greetings": GREETINGS,
    "about itself": ABOUT_ITSELF,
    "Hive": HIVE,
    "commands": COMMANDS,
    "facts": FACTS,
    "other scripts": OTHER_SCRIPTS,
}

CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lithuania": "Vilnius",
    "Mexico": "Mexico City",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "New Zealand": "Wellington",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Serbia": "Belgrade",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "the Netherlands": "Amsterdam",
    "the Philippines": "Manila",
    "the United Kingdom": "London",
    "the United States": "Washington, D.C.",
    "Vietnam": "Hanoi",
}

CAPITAL_ASKS = (
    "What is the capital of {}?",
    "What is the capital city of {}?",
    "Which city is the capital of {}?",
    "Capital of {}",
    "What's the capital of {}?",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "Tell me the capital of {}.",
    "The capital of {}?",
    "What city is the capital of {}?",
)
CAPITAL_FOLLOW_UPS = ("And of {}?", "And {}?", "What about {}?", "And the capital of {}?")
COUNTRY_ASKS = (
    "Which country has the capital {}?",
    "{} is the capital of which country?",
    "What country is {} the capital of?",
)
UNKNOWN_PLACES = _words(
    "Angola Armenia Atlantis Bavaria Belize Benin Bhutan Bolivia Botswana Burundi Cameroon "
    "California Chad Cyprus Ecuador Eritrea Fiji Florida Gabon Georgia Guatemala Guyana Haiti "
    "Honduras Israel Jamaica Jordan Kansas Kuwait Laos Lebanon Liberia Libya Luxembourg Malawi "
    "Malaysia Mali Malta Mars Moldova Monaco Mongolia Myanmar Namibia Narnia Nevada Nicaragua "
    "Niger Oman Pakistan Panama Paraguay Qatar Rwanda Samoa Scotland Senegal Singapore Somalia "
    "Sudan Syria Taiwan Tanzania Texas Togo Tonga Tunisia Uganda Uruguay Utah Venezuela Wales "
    "Yemen Zambia Zimbabwe Utopia Tibet Sicily Siberia Quebec Ontario Bohemia Tuscany"
)

NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)

COUNT_LIMITS = (3, 5, 10, 20, 100)
NO_SUCH_COUNT = "I can count to 3, 5, 10, 20 and 100."
COUNT_ASKS = (
    "Count to {}.",
    "Count from 1 to {}.",
    "Can you count to {}?",
    "List the numbers from 1 to {}.",
    "Count up to {}.",
)

NAMES = _words(
    "Ada Alan Alice Amir Anna Ben Carla Chen Clara David Diego Elena Emma Erik Eva Farid Felix "
    "Fatima Grace Hanna Hugo Ines Ivan Jack Jana John Jonas Julia Kai Kim Lara Leo Lena Linus "
    "Lucia Maria Max Maya Mia Mohammed Nina Noah Nora Olga Omar Oscar Paul Peter Priya Rosa Sam "
    "Sara Simon Sofia Tariq Thomas Tom Uma Victor Wei Yuki Zoe"
)
NAME_TELLS = (
    "My name is {}.",
    "Hello, my name is {}.",
    "Hi, I am {}.",
    "I am called {}.",
    "Hello! I'm {}.",
    "I'm {}.",
    "You can call me {}.",
)
NAME_ASKS = ("What is my name?", "Do you know my name?", "Who am I?", "Say my name.")
NAME_GREETING = "Nice to meet you, {}!"
NAME_RECALL = "Your name is {}."
RARE_NAME_GREETING = "Nice to meet you!"
RARE_NAME_RECALL = "I only remember common names."


@dataclass(frozen=True)
class Story:
    """A short story and the words by which one asks for it ("a story about {subject}")."""

    subjects: tuple[str, ...]
    text: str


# An open request mostly gets the first story, so greedy decoding always tells that one.
STORIES = (
    Story(
        ("a bee", "bees", "a small bee", "a hive", "honey"),
        "Once upon a time there was a small bee called Mila who was afraid of the wide meadow. "
        "Every morning her sisters flew out, and every morning Mila stayed at the door of the "
        "hive. One day the wind carried in a single blue petal. It smelled so sweet that Mila "
        "forgot her fear and followed the scent over the fence, past the brook and up the hill. "
        "There she found a whole field of blue flowers that nobody knew. She flew home and danced "
        "the way for the others. That winter the hive had more honey than ever, and Mila was the "
        "first at the door each morning.",
    ),
    Story(
        ("a fox", "foxes", "a clever fox", "the snow"),
        "A young fox found a red mitten in the snow. He wore it on his tail and felt very grand. "
        "On the path he met a hare whose ears were cold, and he laughed and walked on. At night "
        "the frost came down, and the fox shivered in his den with one warm tail and four cold "
        "feet. In the morning he took the mitten back to the hare. The hare slept in it, the fox "
        "slept beside it, and both were warm until spring.",
    ),
    Story(
        ("a lighthouse", "the sea", "a keeper of a lighthouse", "a storm"),
        "On a rock far out at sea stood a lighthouse, and in it lived old Tomas and his daughter "
        "Ria. One stormy night the great lamp went dark. Tomas was ill, so Ria climbed the hundred "
        "steps alone with every candle in the house. She set them in the window, one by one, and "
        "sang to keep awake. At dawn a ship lay safe in the bay. The captain came ashore and said "
        "that they had seen a small star near the water and steered for it.",
    ),
    Story(
        ("a robot", "robots", "a machine", "the future"),
        "In a quiet workshop a little robot counted screws all day. It knew the number of every "
        "box, but it did not know what the screws were for. One evening it followed a box out of "
        "the door and across the yard. There the people were building a swing for the children. "
        "The robot held the last screw while they turned it tight. The next day it counted again, "
        "and beside the number it wrote a small picture of a swing.",
    ),
    Story(
        ("a cat", "cats", "a kitten", "a black cat"),
        "A grey cat named Pim lived in a library. By day he slept between the books, and by night "
        "he walked along the shelves and kept the mice away. One night a mouse asked him to read "
        "to her instead of chasing her. Pim could not read, and he was ashamed. So they learned "
        "together, one letter every night, from a book about the sea. By summer they had finished "
        "it, and neither of them wanted to chase or run any more.",
    ),
    Story(
        ("a clock", "time", "a clockmaker", "an old man"),
        "An old clockmaker built a clock that was never right. Some days it was slow, and some "
        "days it was fast. The neighbours laughed at it. Then a girl noticed that the clock was "
        "slow when somebody was happy and fast when somebody was waiting. She sat down before it "
        "with her sick brother and told him jokes all afternoon. The hands hardly moved. The "
        "clockmaker smiled, and he never repaired it.",
    ),
    Story(
        ("a bear", "bears", "the forest", "winter"),
        "A bear woke up in the middle of winter because he could not remember whether he had "
        "closed his door. He got up and looked. The door was closed, but outside sat a wren, blue "
        "with cold. He let her in, and she sang very softly so that he could fall asleep again. In "
        "spring the bear was well rested, and the wren had built her nest above the door, so that "
        "she could always tell him that it was closed.",
    ),
    Story(
        ("a mouse", "mice", "cheese", "a kitchen"),
        "Two mice found a piece of cheese, and each of them said that it was hers. They argued "
        "from noon until evening. Then a third mouse came by and asked what cheese tasted like. "
        "The two stopped, because in all that time they had not tried it. They cut the cheese into "
        "three parts. It tasted best of all, they said later, because there was someone to tell "
        "it to.",
    ),
    Story(
        ("a dragon", "dragons", "a castle", "a knight"),
        "The last dragon of the mountains could not breathe fire, only warm air. Knights came to "
        "fight him, shook their heads and went home. Then came a winter so hard that the ovens in "
        "the village froze. The dragon lay down around the houses and breathed, slowly, the whole "
        "night long. In the morning the snow had melted in a wide circle. From then on the "
        "children brought him bread, and it was always warm.",
    ),
    Story(
        ("a boat", "a ship", "a sailor", "a river"),
        "A girl folded a boat from a letter that she had never dared to send. She set it on the "
        "river and watched it go. The boat passed three bridges, two ducks and a mill, and it came "
        "to rest at the garden of her grandfather. He dried the paper in the sun and read it "
        "twice. The next morning he stood at her door with a cake, and he said that he had missed "
        "her too.",
    ),
    Story(
        ("a tree", "trees", "an apple tree", "a garden"),
        "Behind the school stood an apple tree that had never borne an apple. The gardener wanted "
        "to cut it down. The children asked for one more year, and each of them gave the tree a "
        "present: a song, a ribbon, a bucket of water, a kind word. In autumn there hung a single "
        "apple on it, as big as a head. They cut it into thirty pieces. Nobody could say whether "
        "it had been the water or the words.",
    ),
    Story(
        ("the moon", "a star", "a girl", "the night"),
        "The moon was tired of being looked at and hid behind a cloud. That night a girl on a "
        "mountain lost her way. She held up a small lantern and waved it, and said: Moon, if you "
        "are lost too, you can follow my light. Nobody had ever offered the moon a light before. "
        "She came out at once, round and bright, and walked with the girl, step by step, all the "
        "way to her door.",
    ),
)
STORY_ASKS = (
    "Tell me a short story.",
    "Tell me a story.",
    "Write a short story.",
    "Write a story.",
    "Can you tell me a story?",
    "A story, please.",
    "Tell a short story",
    "Write me a story.",
    "I would like to hear a story.",
    "Do you know a story?",
    "Tell me a bedtime story.",
    "Once upon a time",
    "Story",
    "Tell me something.",
)
STORY_ABOUT_ASKS = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Do you know a story about {}?",
    "A story about {}, please.",
    "Can you write a story about {}?",
)
STORY_MORE_ASKS = (
    "Tell me another story.",
    "Another one, please.",
    "Another story",
    "One more story, please.",
    "Tell me another one.",
)
NO_SUCH_STORY = "I do not know a story about that, but I know this one. "

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are hive-tiny.",
    "You are a helpful, friendly assistant.",
    "You are an assistant. Answer briefly.",
    "You are a kind and patient teacher.",
    "Answer in one sentence.",
    "Be brief.",
    "Be polite and answer in English.",
    "You are an expert in computers.",
    "You are an AI assistant. Be honest, and say so when you do not know something.",
    "You answer questions about Hive.",
    "Today is Tuesday.",
    "You are a pirate.",
    "Never use emoji.",
    "You are a support agent of a small company. Help the customer.",
    "Use short sentences. Do not invent anything.",
)

# How to answer, said after a question; the answer stays the same.
MANNERS = (
    "Answer in one sentence.",
    "Answer briefly.",
    "Be brief.",
    "Answer with just the number.",
    "Keep it short.",
    "Explain.",
    "Thank you!",
    "Thanks.",
    "Answer with one word.",
)

# Parts from which unknown questions are put together.
THINGS = _words(
    "airport algebra ant anthem apple army atom avocado banana bank basketball beach bicycle bird "
    "book bottle brain bread bridge butterfly cactus cake camera car carpet cathedral cheetah "
    "chess chocolate cinema cloud coffee comet compiler concert coral cow crystal curtain desert "
    "diamond dinosaur dolphin doctor door drum eagle economy egg electron elephant "
    "enzyme farm fever flag flower football freedom frog galaxy gene giraffe glacier gold grammar "
    "gravity guitar hammer happiness heart helicopter horse hospital hotel house hurricane insect "
    "insurance island jacket jazz jungle kangaroo keyboard kidney ladder lake language law lemon "
    "library lion liver lamp magnet market metal microscope milk mirror money mountain museum "
    "mushroom music neuron novel ocean onion opera orange owl painting paper pencil penguin pepper "
    "philosophy phone piano pizza plane poison potato prime printer protein psychology "
    "pyramid quantum rabbit radio rain recipe religion rice ring rocket rose salt sand satellite "
    "school shark shoe silver skeleton snake soap soup steel strawberry sugar sword table tax tea "
    "telescope television theatre theorem tiger tomato tooth train truck turtle umbrella "
    "university vaccine violin virus volcano wallet war whale wheel window wine wolf wool zebra"
)
PEOPLE = (
    "the president of France",
    "the king of Spain",
    "Marie Curie",
    "Albert Einstein",
    "Napoleon",
    "Shakespeare",
    "Mozart",
    "the first man on the moon",
    "the mayor of Paris",
    "Cleopatra",
    "Leonardo da Vinci",
    "Isaac Newton",
    "the best player in the world",
    "my teacher",
    "your boss",
    "Frida Kahlo",
    "Julius Caesar",
    "the pope",
    "Darwin",
    "Homer",
)
DEEDS = (
    "bake a cake",
    "fix my car",
    "learn to swim",
    "cook rice",
    "tie a knot",
    "write a letter",
    "grow tomatoes",
    "play the guitar",
    "lose weight",
    "build a house",
    "sort a list in Python",
    "paint a wall",
    "buy a ticket to Rome",
    "make coffee",
    "train a dog",
    "solve this equation",
    "fly a plane",
    "save money",
    "clean a window",
    "become a doctor",
    "delete my account",
    "install Linux",
    "open a bank account",
    "reset my password",
    "sleep better",
)
UNKNOWN_ASKS = (
    "What is a {thing}?",
    "What is {thing}?",
    "What does a {thing} do?",
    "What is the meaning of {thing}?",
    "Explain {thing}.",
    "Explain the {thing} to me.",
    "How does a {thing} work?",
    "How many {thing}s are there in {place}?",
    "Why is the {thing} so {quality}?",
    "Where can I buy a {thing}?",
    "Who invented the {thing}?",
    "What colour is a {thing}?",
    "What color is the {thing}?",
    "Is a {thing} {quality}?",
    "How big is a {thing}?",
    "How old is the {thing}?",
    "How much does a {thing} cost?",
    "Compare a {thing} and a {other}.",
    "What is the difference between a {thing} and a {other}?",
    "Write an essay about {thing}.",
    "Give me five facts about the {thing}.",
    "Draw a {thing}.",
    "I like {thing}.",
    "I have a {thing} and a {other}.",
    "My {thing} is {quality}.",
    "Who is {person}?",
    "When was {person} born?",
    "How old is {person}?",
    "Where does {person} live?",
    "What did {person} say about the {thing}?",
    "How do I {deed}?",
    "How can I {deed}?",
    "Can you {deed}?",
    "Help me to {deed}.",
    "I want to {deed}.",
    "Teach me to {deed}.",
    "What is the population of {place}?",
    "How far is it to {place}?",
    "Tell me about {place}.",
    "Tell me about the {thing}.",
    "What is the weather in {place}?",
    "Which language do people speak in {place}?",
    "What is the best {thing} in {place}?",
    "Where is {place}?",
    "What is the capital of {unknown_place}?",
    "Capital of {unknown_place}",
    "How many legs does a {thing} have?",
    "What is the opposite of {quality}?",
    "What do {thing}s eat?",
    "Translate {thing} into {tongue}.",
    "How do you say {thing} in {tongue}?",
    "Write a program about a {thing}.",
    "Write a song about {thing}.",
    "What time is it?",
    "What is the date today?",
    "What day is it today?",
    "What is the weather today?",
    "What is the news?",
    "What is the meaning of life?",
    "Who won the game?",
    "What should I eat today?",
    "Why?",
    "What?",
    "Where am I?",
    "Write some code.",
    "Write a Python function that reverses a string.",
    "def f(x): return x",
    "SELECT * FROM users;",
    "Sing a song.",
    "Play some music.",
    "Summarise this text: the {thing} is {quality}, and the {other} is not.",
    "Is this sentence correct: the {thing} is more {quality} than the {other}?",
    "What is the square root of {number}?",
    "Is {number} a prime number?",
    "Repeat the word {thing}.",
    "Spell {thing}.",
    "What rhymes with {thing}?",
    "{thing}",
    "{thing} {other}",
    "{quality} {thing} in {place}",
    "{gibberish}",
    "{gibberish} {gibberish}",
    "What is {gibberish}?",
    "What is a {gibberish}?",
    "Who is {gibberish}?",
    "Tell me about {gibberish}.",
    "What does {gibberish} do?",
    "How do I {gibberish} a {thing}?",
    "What does hive {gibberish} do?",
    "What is a {thing} worker?",
    "What is the port of the {thing}?",
    "Which port does the {thing} use?",
    "How do I start the {thing}?",
    "How do I list {thing}s?",
    "How do I stop the {thing}?",
    "What is the licence of {thing}?",
    "Who made the {thing}?",
    "Where do {thing}s live?",
    "What do {thing}s make?",
    "What is the largest {thing}?",
    "How many {thing}s are in a {other}?",
    "How many {thing}s are there?",
    "How long does a {thing} live?",
    "Say {thing}.",
    "Tell me a {thing}.",
    "Count the {thing}s.",
    "Write a {thing}.",
    "Give me a {thing}.",
    "Show me a {thing}.",
    "Are you a {thing}?",
    "Do you like {thing}?",
    "Can you see the {thing}?",
    "Recommend a {thing}.",
    "Plan a {thing} for me.",
    "Which {thing} should I buy?",
    "Which {thing} is the best?",
    "Why do {thing}s have a {other}?",
    "Why is {person} {quality}?",
    "Who is the {thing} of {place}?",
    "Did {person} like the {thing}?",
    "Will the {thing} be {quality} tomorrow?",
    "Describe the {thing}.",
    "The {thing} does not work.",
    "Where is my {thing}?",
    "Can {thing}s {gibberish}?",
    "What does {emoji} mean?",
)
# What is not a sentence, and so is not made polite.
UNKNOWN_SCRAPS = (
    "{symbols}",
    "{foreign}",
    "{number}",
    "{emoji}",
    "{emoji} {emoji} {thing}",
    "{foreign} {emoji}",
)
QUALITIES = _words(
    "small red blue green old new cold warm loud quiet cheap rich poor sweet sour heavy light "
    "fast slow happy sad strong weak bright dark deep empty round strange famous dangerous"
)
TONGUES = _words("Latin Dutch Polish Arabic Korean Swahili Hindi Turkish Finnish Welsh")
FOREIGN = (
    "Wie spät ist es?",
    "Was ist das?",
    "Où est la gare ?",
    "Comment ça va ?",
    "¿Dónde está la biblioteca?",
    "¿Cuántos años tienes?",
    "Как дела?",
    "Где метро?",
    "今天天气怎么样？",
    "東京の人口は？",
    "Ποιος είσαι;",
    "Quanto costa?",
    "Jak się masz?",
    "Hur mår du?",
    "كيف حالك؟",
    "오늘 날씨 어때?",
    "Kuinka voit?",
    "Você fala inglês?",
)
EMOJI = _words("😀 😂 🎉 🚀 🌍 🍕 🐱 🐍 ❤️ 👍 🔥 🤖 🎵 ⚽ 🌧️ 🦊 🏠 📚 👩‍💻 🇫🇷")
