"""The vocabulary of the city: needs, categories, brands and titles in Russian and English, and their natural ties."""

import dataclasses

import numpy as np

SERVICES = ("samokat", "megamarket", "kuper")


@dataclasses.dataclass(frozen=True)
class Need:
    """A need: how often, what serves it, where, what it leads to, and when it comes (all in log-odds).

    Attributes:
      base: log-odds of the need before any other effect.
      categories: category -> fit, at least 0.
      services: weights of `SERVICES`.
      next: need -> how much more likely it is right after this one.
      when: an hour, weekday, season, weather, temperature or holiday value -> effect.
    """

    base: float
    categories: dict[str, float]
    services: tuple[float, float, float]
    next: dict[str, float]
    when: dict[str, float]


NEEDS: dict[str, Need] = {
    "breakfast": Need(
        0.3, {"dairy": 1.0, "bakery": 0.3, "coffee": 0.0}, (8, 0.5, 1.5), {"dinner": 3.6, "school": 2.2},
        {"morning": 2.2, "night": -1.5, "evening": -1.5},
    ),
    "dinner": Need(
        0.3, {"meat": 1.0, "vegetables": 0.3, "ready_meals": 0.0}, (1.2, 0.5, 8), {"film": 3.6, "breakfast": 2.2},
        {"evening": 1.6, "morning": -2.0, "rain": 0.6},
    ),
    "party": Need(
        -0.4, {"snacks": 0.6, "drinks": 1.0}, (1.5, 0.5, 8), {"cleaning": 4.0, "cold": 1.8},
        {"weekend": 1.3, "holiday": 1.6, "eve": 1.4, "evening": 0.8},
    ),
    "gym": Need(
        0.0, {"sport_food": 1.0, "sport_gear": 0.5}, (0.6, 8, 1.4), {"breakfast": 2.2, "gym": 1.8},
        {"weekday": 0.4, "morning": 0.7, "spring": 0.7, "holiday": -1.2},
    ),
    "gift": Need(
        0.0, {"toys": 0.0, "beauty": 0.8, "gadgets": 0.5}, (0.5, 9, 0.5), {"party": 3.8, "film": 1.2},
        {"eve": 2.2, "winter": 0.4, "day": 0.4},
    ),
    "cold": Need(
        -0.1, {"pharmacy": 1.2, "tea_honey": 0.6}, (8, 0.6, 1.4), {"cold": 2.2, "film": 1.8},
        {"winter": 0.8, "autumn": 0.7, "summer": -0.9, "frost": 0.6, "rain": 0.8},
    ),
    "cleaning": Need(
        0.0, {"cleaning": 1.0, "laundry": 0.6}, (0.8, 2.0, 7.2), {"dinner": 2.2, "pet": 1.6},
        {"weekend": 0.8, "day": 0.6, "spring": 0.5, "holiday": -0.6},
    ),
    "baby": Need(
        0.0, {"baby_food": 0.6, "diapers": 1.0}, (0.6, 4.4, 5.0), {"baby": 2.2, "cold": 1.8},
        {"night": 1.2, "day": 0.4},
    ),
    "pet": Need(
        0.0, {"pet_food": 1.2, "pet_toys": 0.3}, (0.8, 8, 1.2), {"pet": 1.2, "gym": 2.4},
        {"day": 0.5, "weekend": 0.3},
    ),
    "film": Need(
        0.1, {"snacks": 0.5, "ice_cream": 0.8, "ready_meals": 0.0}, (8.5, 0.3, 1.2), {"breakfast": 3.6, "film": 0.6},
        {"evening": 1.3, "night": 1.4, "morning": -2.0, "rain": 0.7, "snow": 0.5},
    ),
    "school": Need(
        -0.1, {"stationery": 1.0, "bags": 0.3, "toys": 0.0}, (0.8, 8, 1.2), {"baby": 2.4, "gift": 2.0},
        {"autumn": 1.1, "summer": -1.0, "weekday": 0.5, "day": 0.5},
    ),
    "trip": Need(
        -0.2, {"bags": 1.0, "fruit": 0.4, "drinks": 0.0}, (0.8, 6.5, 2.7), {"cleaning": 2.4, "trip": 1.4},
        {"summer": 1.2, "hot": 0.8, "frost": -0.8, "rain": -0.6, "eve": 0.6, "weekend": 0.4},
    ),
}  # fmt: skip


# What of a taste matters in a category, and the values it can take; a value is a profile's value and an item's variety.
ASPECTS: dict[str, tuple[str, ...]] = {
    "age": ("18-24", "25-34", "35-49", "50+"),
    "household": ("single", "couple", "family"),
    "diet": ("classic", "vegan", "protein", "sugarfree"),
    "pets": ("cat", "dog", "bird"),
    "gym": ("strength", "running", "yoga"),
    "budget": ("low", "middle", "high"),
}
# aspect -> for each of its values: the item's variety, Russian words, English words
VARIETIES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "age": (
        ("neo", "серия Нео", "Neo line"),
        ("urban", "серия Урбан", "Urban line"),
        ("comfort", "серия Комфорт", "Comfort line"),
        ("retro", "серия Ретро", "Retro line"),
    ),
    "household": (
        ("mini", "мини-упаковка", "mini pack"),
        ("standard", "обычная упаковка", "standard pack"),
        ("family", "семейная упаковка", "family pack"),
    ),
    "diet": (
        ("classic", "по-домашнему", "home style"),
        ("vegan", "растительный состав", "plant-based"),
        ("protein", "с протеином", "with protein"),
        ("sugarfree", "без сахара", "sugar free"),
    ),
    "pets": (
        ("cat", "для кошек", "for cats"),
        ("dog", "для собак", "for dogs"),
        ("bird", "для птиц", "for birds"),
    ),
    "gym": (
        ("strength", "для силовых", "for strength training"),
        ("running", "для бега", "for running"),
        ("yoga", "для йоги", "for yoga"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Category:
    """A category: the aspect of taste that picks its variety, how items repeat, when it sells, and its products.

    Attributes:
      aspect: key of `VARIETIES`.
      repeat: log-odds of buying the very same item again (negative: a durable).
      when: a temperature or weather value -> effect on the item's utility.
      products: (Russian, English) nouns.
    """

    aspect: str
    repeat: float
    when: dict[str, float]
    products: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """(Russian, English) of "Russian/English, ..."."""
    return tuple((pair.split("/")[0], pair.split("/")[1]) for pair in text.split(", "))


CATEGORIES: dict[str, Category] = {
    "dairy": Category("diet", 1.2, {}, _pairs("Кефир 1%/Kefir 1%, Молоко/Milk, Йогурт/Yoghurt, Творог/Cottage cheese")),
    "bakery": Category("diet", 0.8, {"frost": 0.4}, _pairs("Хлеб/Bread, Багет/Baguette, Сырники/Curd pancakes")),
    "coffee": Category(
        "diet", 1.2, {"frost": 0.8, "cold": 0.4, "hot": -0.4}, _pairs("Кофе/Coffee, Какао/Cocoa, Цикорий/Chicory")
    ),
    "meat": Category("diet", 0.6, {"hot": -0.3}, _pairs("Котлеты/Cutlets, Фарш/Mince, Колбаски/Sausages")),
    "vegetables": Category("diet", 0.6, {"hot": 0.8}, _pairs("Салат/Salad, Овощи/Vegetables, Гаспачо/Gazpacho")),
    "ready_meals": Category(
        "diet", 0.4, {"rain": 0.8, "snow": 0.6}, _pairs("Пельмени/Dumplings, Суп/Soup, Плов/Pilaf")
    ),
    "fruit": Category("diet", 0.5, {"hot": 0.6}, _pairs("Яблоки/Apples, Фруктовая смесь/Fruit mix, Пюре/Puree")),
    "snacks": Category("diet", 0.6, {"cold": 0.3}, _pairs("Чипсы/Crisps, Орехи/Nuts, Печенье/Biscuits")),
    "drinks": Category(
        "household", 0.8, {"hot": 1.2, "frost": -0.6}, _pairs("Лимонад/Lemonade, Морс/Berry drink, Вода/Water")
    ),
    "ice_cream": Category(
        "diet",
        0.4,
        {"hot": 1.6, "frost": -1.2, "cold": -0.5},
        _pairs("Мороженое/Ice cream, Пломбир/Plombir, Сорбет/Sorbet"),
    ),
    "sport_food": Category("gym", 1.0, {}, _pairs("Коктейль/Shake, Батончик/Bar, Изотоник/Isotonic")),
    "sport_gear": Category("gym", -1.5, {}, _pairs("Перчатки/Gloves, Коврик/Mat, Бутылка/Bottle")),
    "toys": Category(
        "household", -1.5, {}, _pairs("Конструктор/Building set, Пазл/Puzzle, Настольная игра/Board game")
    ),
    "beauty": Category("age", -1.0, {}, _pairs("Духи/Perfume, Крем/Cream, Шампунь/Shampoo")),
    "gadgets": Category("age", -2.0, {}, _pairs("Наушники/Headphones, Колонка/Speaker, Лампа/Lamp")),
    "pharmacy": Category(
        "age", 0.8, {"frost": 0.3}, _pairs("Спрей для горла/Throat spray, Витамины/Vitamins, Пластырь/Plasters")
    ),
    "tea_honey": Category(
        "diet", 0.8, {"frost": 0.9, "cold": 0.5, "hot": -0.8}, _pairs("Чай/Tea, Мёд/Honey, Варенье/Jam")
    ),
    "cleaning": Category("household", 0.8, {}, _pairs("Средство для посуды/Dish soap, Губки/Sponges, Салфетки/Wipes")),
    "laundry": Category(
        "household", 0.8, {}, _pairs("Порошок/Washing powder, Гель для стирки/Laundry gel, Кондиционер/Softener")
    ),
    "baby_food": Category("diet", 0.9, {}, _pairs("Каша/Porridge, Детское пюре/Baby puree, Смесь/Formula")),
    "diapers": Category("household", 1.2, {}, _pairs("Подгузники/Nappies, Трусики/Pants, Пелёнки/Pads")),
    "pet_food": Category("pets", 1.2, {}, _pairs("Корм/Food, Лакомство/Treat, Паштет/Pate")),
    "pet_toys": Category("pets", -1.0, {}, _pairs("Игрушка/Toy, Миска/Bowl, Лежанка/Bed")),
    "stationery": Category("age", -0.3, {}, _pairs("Тетрадь/Notebook, Ручки/Pens, Краски/Paints")),
    "bags": Category("age", -1.5, {"rain": 0.3}, _pairs("Рюкзак/Backpack, Сумка/Bag, Чемодан/Suitcase")),
}


# Invented brands: (Russian, English).
BRANDS = _pairs(
    "Веснушка/Vesnushka, Лукошко/Lukoshko, Зорькино/Zorkino, Рябинка/Ryabinka, Тихий Двор/Tihiy Dvor, "
    "Ладошка/Ladoshka, Северяне/Severyane, Гулянка/Gulyanka, Полдник/Poldnik, Брусничка/Brusnichka, "
    "Мякиш/Myakish, Чердак/Cherdak, Околица/Okolitsa, Самоцвет/Samotsvet, Пуговка/Pugovka, "
    "Ветролов/Vetrolov, Кудесник/Kudesnik, Облачко/Oblachko, Журавлик/Zhuravlik, Маячок/Mayachok, "
    "Капитошка/Kapitoshka, Янтарь/Yantar, Снегирь/Snegir, Барвинок/Barvinok, Перезвон/Perezvon, "
    "Шалаш/Shalash, Ивушка/Ivushka, Росинка/Rosinka, Дубрава/Dubrava, Скворец/Skvorets, Каравай/Karavay, "
    "Лесовик/Lesovik, Заря/Zarya, Теремок/Teremok, Родник/Rodnik, Огонёк/Ogonyok"
)


def brand_token(brand: int) -> str:
    """The attribute value of a brand: lower case, no spaces."""
    return BRANDS[brand][1].lower().replace(" ", "_")


def write_titles(
    category_I: np.ndarray, product_I: np.ndarray, brand_I: np.ndarray, variety_I: np.ndarray, price_I: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`[I]` texts ("<Russian> / <English>") and `[I]` attribute tokens of the items."""
    text, attributes = [], []
    names = list(CATEGORIES)
    for c, p, b, v, r in zip(category_I, product_I, brand_I, variety_I, price_I, strict=True):
        category = CATEGORIES[names[c]]
        ru, en = category.products[p % len(category.products)]
        token, variety_ru, variety_en = VARIETIES[category.aspect][v]
        brand_ru, brand_en = BRANDS[b]
        text.append(f"{ru} «{brand_ru}», {variety_ru} / {en} {brand_en}, {variety_en}")
        attributes.append(f"category={names[c]} brand={brand_token(b)} price={r + 1} variety={token}")
    return np.array(text, dtype=np.str_), np.array(attributes, dtype=np.str_)
