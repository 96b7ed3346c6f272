"""What the texts of the city are made of: names of its needs, categories, prices and services, and forms of sentences.

Everything is there twice, (Russian, English). Names stand in quotation marks or behind a colon, so that Russian ones
keep their form. A form's `{fields}` are the facts of `corpus.Facts`.
"""

from typing import TypeAlias

Pair: TypeAlias = tuple[str, str]
Forms: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]  # of Russian sentences, of English ones

NEEDS: dict[str, Pair] = {
    "breakfast": ("завтрак", "breakfast"),
    "dinner": ("ужин", "dinner"),
    "party": ("вечеринка", "a party"),
    "gym": ("тренировка", "a workout"),
    "gift": ("подарок", "a gift"),
    "cold": ("простуда", "a cold"),
    "cleaning": ("уборка", "cleaning"),
    "baby": ("малыш", "the baby"),
    "pet": ("питомец", "the pet"),
    "film": ("вечер с фильмом", "a film night"),
    "school": ("школа", "school"),
    "trip": ("поездка", "a trip"),
}
CATEGORIES: dict[str, Pair] = {
    "dairy": ("молочное", "dairy"),
    "bakery": ("выпечка", "bakery"),
    "coffee": ("кофе и какао", "coffee and cocoa"),
    "meat": ("мясное", "meat"),
    "vegetables": ("овощи", "vegetables"),
    "ready_meals": ("готовая еда", "ready meals"),
    "fruit": ("фрукты", "fruit"),
    "snacks": ("закуски", "snacks"),
    "drinks": ("напитки", "drinks"),
    "ice_cream": ("мороженое", "ice cream"),
    "sport_food": ("спортивное питание", "sports nutrition"),
    "sport_gear": ("спортивные товары", "sports gear"),
    "toys": ("игрушки", "toys"),
    "beauty": ("красота", "beauty"),
    "gadgets": ("электроника", "gadgets"),
    "pharmacy": ("аптека", "pharmacy"),
    "tea_honey": ("чай и мёд", "tea and honey"),
    "cleaning": ("чистота", "cleaning supplies"),
    "laundry": ("стирка", "laundry"),
    "baby_food": ("детское питание", "baby food"),
    "diapers": ("подгузники", "nappies"),
    "pet_food": ("корм", "pet food"),
    "pet_toys": ("для питомцев", "pet accessories"),
    "stationery": ("канцтовары", "stationery"),
    "bags": ("сумки", "bags"),
}
SERVICES: dict[str, Pair] = {
    "samokat": ("Самокат", "Samokat"),
    "megamarket": ("Мегамаркет", "Megamarket"),
    "kuper": ("Купер", "Kuper"),
}
PRICES: tuple[Pair, ...] = (("недорого", "a low price"), ("средняя цена", "a fair price"), ("дорого", "a high price"))
BUDGETS: tuple[Pair, ...] = (("небольшой", "small"), ("средний", "medium"), ("большой", "large"))

DESCRIPTIONS: tuple[Forms, ...] = (
    (
        (
            "{product} «{brand}» — {variety}. Раздел: {category}.",
            "«{brand}»: {product}, {variety}. Категория: {category}.",
            "Товар: {product}. Марка: «{brand}». Особенность: {variety}. Раздел: {category}.",
        ),
        (
            "{product} by {brand}: {variety}. Section: {category}.",
            "{brand} {product}, {variety}. Category: {category}.",
            "Item: {product}. Brand: {brand}. Feature: {variety}. Section: {category}.",
        ),
    ),
    (
        ("Когда пригодится: {needs}.", "Для чего берут: {needs}.", "Подходит под случай: {needs}."),
        ("Good for: {needs}.", "People buy it for: {needs}.", "When it helps: {needs}."),
    ),
    (
        ("Где купить: {service}. Цена: {price}.", "Сервис: {service}, {price}.", "В сервисе «{service}» — {price}."),
        ("Sold at {service}, {price}.", "Where: {service}. Price: {price}.", "{service} has it at {price}."),
    ),
)  # fmt: skip
OPENINGS: Forms = (
    (
        "Взяли {product} «{brand}» в сервисе «{service}».",
        "Отзыв о товаре: {product} «{brand}», {variety}.",
        "Заказ из сервиса «{service}»: {product} «{brand}».",
        "{product} «{brand}»: делюсь впечатлением.",
    ),
    (
        "We got {product} by {brand} from {service}.",
        "Review of {product} {brand}, {variety}.",
        "An order from {service}: {product} by {brand}.",
        "{product} {brand}: here is what I think.",
    ),
)
# (whether the item has what the reviewer's type likes) -> what is said of it
VARIETY: dict[bool, Forms] = {
    True: (
        ("Вариант «{variety}» — ровно то, что мы ищем.", "Для нас важно: {variety}, и здесь всё так."),
        ("It is {variety}, exactly what we look for.", "We care about one thing, {variety}, and here it is."),
    ),
    False: (
        ("Нам нужнее «{wanted}», а здесь «{variety}».", "Жаль, что не «{wanted}», а «{variety}»."),
        ("We wanted {wanted}, and this is {variety}.", "A pity that it is {variety} and not {wanted}."),
    ),
}
BUDGET: dict[bool, Forms] = {
    True: (("Цена подходит: {price}.", "По деньгам нормально."), ("The price suits us: {price}.", "Fair for us.")),
    False: (
        ("Бюджет у нас {budget}, а здесь {price}.", "С ценой не угадали: {price}."),
        ("Our budget is {budget}, and this is {price}.", "The price is off for us: {price}."),
    ),
}  # fmt: skip
BRAND: tuple[Forms, ...] = (  # by the taste for the brand: dislikes it, neither, likes it
    (("Марку «{brand}» не люблю.", "«{brand}» опять подвела."), ("I do not like {brand}.", "{brand} let us down.")),
    (("О марке «{brand}» сказать нечего.",), ("Nothing to say about the brand.",)),
    (("«{brand}» — любимая марка.", "«{brand}» берём всегда."), ("{brand} is our choice.", "We always take {brand}.")),
)  # fmt: skip
VERDICTS: Forms = (
    ("Итог: {stars} из 5. {again}", "Оценка — {stars}. {again}"),
    ("Overall {stars} of 5. {again}", "My rating: {stars}. {again}"),
)
AGAIN: dict[bool, Pair] = {
    True: ("Возьмём ещё.", "We will buy it again."),
    False: ("Больше не возьмём.", "Never again."),
}
QUESTION, ANSWER = ("Вопрос: ", "Question: "), ("Ответ: ", "Answer: ")
QUESTIONS: dict[str, tuple[Forms, Forms]] = {  # what is asked for -> forms of the question, and of the answer
    "where": (
        (
            ("Где купить {product} «{brand}», {variety}?", "В каком сервисе есть {product} «{brand}» ({variety})?"),
            ("Where can I buy {product} by {brand}, {variety}?", "Which service has {product} {brand} ({variety})?"),
        ),
        (("В сервисе «{service}», {price}.",), ("At {service}, {price}.",)),
    ),
    "need": (
        (
            ("Что взять в сервисе «{service}», если повод — {need}?", "Повод: {need}. Что есть в сервисе «{service}»?"),
            ("What should I get at {service} for {need}?", "I am shopping for {need}. What does {service} have?"),
        ),
        (("Раздел «{category}». Например: {items}.",), ("Look at {category}. For example: {items}.",)),
    ),
    "next": (
        (
            ("Что обычно нужно после повода «{need}»?", "Сначала {need}. А что потом?"),
            ("What do people need after {need}?", "First {need}. What comes next?"),
        ),
        (("Чаще всего: {next_needs}.",), ("Most often: {next_needs}.",)),
    ),
    "brand": (
        (
            ("Какие товары марки «{brand}» есть в сервисе «{service}»?",),
            ("What does {service} sell by {brand}?",),
        ),
        (("Вот они: {brand_items}.",), ("Here they are: {brand_items}.",)),
    ),
}
TASK, REPLY = ("Задание: ", "Instruction: "), ("Ответ: ", "Response: ")
INSTRUCTIONS: dict[str, tuple[Forms, Forms]] = {
    "list": (
        (
            ("Составь список покупок. Повод: {need}. Бюджет: {budget}.", "Собери корзину: {need}, бюджет {budget}."),
            ("Write a shopping list for {need} on a {budget} budget.", "Fill a basket for {need}, budget: {budget}."),
        ),
        (("{lines}",), ("{lines}",)),
    ),
    "translate": (
        (("Переведи на английский: {title}.",), ("Translate into Russian: {title}.",)),
        (("{other_title}.",), ("{other_title}.",)),
    ),
    "sort": (
        (("К какому разделу относится товар: {title}?",), ("Which section does this item belong to: {title}?",)),
        (("{category}.",), ("{category}.",)),
    ),
    "describe": (
        (("Опиши товар одной строкой: {product} «{brand}».",), ("Describe {product} by {brand} in one line.",)),
        (("{variety}, {price}, раздел «{category}».",), ("{variety}, {price}, section: {category}.",)),
    ),
}
