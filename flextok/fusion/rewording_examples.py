"""What a model is shown before it rewords a question: for each round other pairs of a question and a new wording."""

INSTRUCTION = "Say each question in other words. The meaning stays the same."

EXAMPLE_SETS = (
    (
        ("what river flows through vienna?", "Which river does Vienna lie on?"),
        ("who painted the night watch?", "The Night Watch is a work of which painter?"),
        ("when did the first world war end?", "In what year was the First World War over?"),
        ("what do pandas eat?", "Which food do pandas live on?"),
    ),
    (
        ("who composed the magic flute?", "Which composer wrote the opera The Magic Flute?"),
        ("where is mount kilimanjaro?", "In what country does Kilimanjaro stand?"),
        ("what money is used in japan?", "Which currency do people pay with in Japan?"),
        ("how many legs does a spider have?", "What is the number of legs of a spider?"),
    ),
    (
        ("what language is spoken in brazil?", "Which language do Brazilians speak?"),
        ("who discovered penicillin?", "Penicillin was found by whom?"),
        ("what is the tallest animal?", "Which animal grows taller than all others?"),
        ("where was marie curie born?", "What is the birthplace of Marie Curie?"),
    ),
    (
        ("which planet is closest to the sun?", "What is the name of the innermost planet?"),
        ("who wrote don quixote?", "Don Quixote comes from the pen of which author?"),
        ("what sport is played at wimbledon?", "For which sport is Wimbledon the place to be?"),
        ("when was the telephone invented?", "In which year did somebody make the first telephone?"),
    ),
    (
        ("what is the capital of canada?", "From which city is Canada governed?"),
        ("who was the first man on the moon?", "Which person set foot on the moon before anyone else?"),
        ("what metal is liquid at room temperature?", "Which metal does not need heat to flow?"),
        ("what ocean lies west of portugal?", "On which ocean is the coast of Portugal?"),
    ),
)
