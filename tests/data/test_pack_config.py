"""The TOML file of a pack plan: a plan follows its settings, and a wrong setting is refused with its key."""

import json
import os
import re
from pathlib import Path

import pytest
from planned_data import write_corpus, write_mask

from distattn.data.files.manifest import Manifest
from distattn.data.packing.pack_config import (
    CorpusConfig,
    PackConfig,
    load_pack_config,
    make_configured_plan,
    open_configured_plan,
    open_corpora,
    vocabulary_of,
)
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.ir.errors import DamagedDataError, DistattnError

HEAD = 'plan = "run.packs"\nseed = 7\nsteps = 5\n'
RULE = "[rule]\ncontext = [[0, 64], [2, 128]]\ntokens_per_step = 512\nwindow = 16\n"
WEB = '[[corpus]]\nname = "web"\nfiles = ["web-*"]\nweight = 3\n'
BOOKS = '[[corpus]]\nname = "books"\nfiles = ["books-0"]\nweight = 1.5\n'


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path, "web", [[30, 200, 7] * 9, [64, 1, 90] * 9])
    write_corpus(tmp_path, "books", [[300, 10, 500]])
    return tmp_path


def written(folder: Path, *parts: str) -> Path:
    (folder / "packs.toml").write_text("".join(parts))
    return folder / "packs.toml"


def refusal(folder: Path, *parts: str) -> str:
    with pytest.raises(DistattnError) as caught:
        load_pack_config(written(folder, *parts))
    place = re.compile(re.escape(f"{folder}/packs.toml") + r"(:\d+)?: ")
    lines = str(caught.value).splitlines()
    assert all(place.match(line) and line.endswith((".", "?")) for line in lines), lines
    return "\n".join(place.sub("", line, count=1) for line in lines)


def manifest(tokenizer: str, vocabulary: int = 50_000) -> Manifest:
    return Manifest("command", tokenizer, tokenizer, vocabulary, None, "text", 1, 1, 1, [])


def test_all_keys_arrive_and_paths_are_relative_to_the_file(folder):
    rest = 'max_documents = 9\nmax_cost = 1.5\nlong_documents = "keep"\nlevel = true\n[rule.cost]\ntoken_cells = 5\n'
    config = load_pack_config(written(folder, HEAD, RULE, rest, WEB, BOOKS, "max_epochs = 2.5\n"))
    rule = PackRule(((0, 64), (2, 128)), 512, 16, 9, 1.5, PackCost(token_cells=5), "keep", True)
    web = CorpusConfig("web", (f"{folder}/web-0", f"{folder}/web-1"), 3.0)
    books = CorpusConfig("books", (f"{folder}/books-0",), 1.5, 2.5)
    assert config == PackConfig(f"{folder}/run.packs", (web, books), rule, 7, 5)


def test_paths_may_be_absolute_and_end_in_a_suffix(folder):
    absolute = WEB.replace("web-*", f"{folder}/web-0.idx").replace("weight = 3", "")
    config = load_pack_config(written(folder, f'plan = "{folder}/other/a.packs"\nsteps = 1\n', RULE, absolute))
    assert config.plan == f"{folder}/other/a.packs" and config.corpus[0].files == (f"{folder}/web-0",)
    assert config.seed == 1


def test_names_with_brackets_are_themselves_and_masks_are_no_tokens(folder):
    strange = folder / "a [1]"
    strange.mkdir()
    corpus = write_corpus(strange, "x[0]", [[20, 30], [40]])
    write_mask(corpus.files[0].prefix, "loss", [[1] * 20, [0] * 30])
    write_mask(corpus.files[0].prefix, "spans", [[], [3, 9]])
    for pattern in ("x[[]0[]]-*", "x[[]0[]]-[01]"):
        config = load_pack_config(written(strange, HEAD, RULE, WEB.replace("web-*", pattern)))
        assert config.corpus[0].files == (f"{strange}/x[0]-0", f"{strange}/x[0]-1")
    config = load_pack_config(written(strange, HEAD, RULE, WEB.replace("web-*", "x[0]-1")))
    assert config.corpus[0].files == (f"{strange}/x[0]-1",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (HEAD.replace("steps", "stpes") + RULE + WEB, "stpes: unknown key. Did you mean steps?"),
        (HEAD + RULE.replace("window", "windw") + WEB, "rule.windw: unknown key. Did you mean rule.window?"),
        (HEAD + RULE + WEB + "weigth = 1", "corpus.0.weigth: unknown key. Did you mean corpus.weight?"),
        (HEAD + RULE + "[rule.cost]\ntokencells = 1\n" + WEB, "rule.cost.tokencells: unknown key. Did you mean rule.cost.tok"),
        (HEAD + "level = true\n" + RULE + WEB, "level: unknown key. Did you mean rule.level?"),
        (HEAD + RULE + WEB + "seed = 3", "corpus.0.seed: unknown key. Did you mean seed, above all tables?"),
        (HEAD + "token_cells = 3\n" + RULE + WEB, "token_cells: unknown key. Did you mean rule.cost.token_cells?"),
        (HEAD + "max_epochs = 3\n" + RULE + WEB, "max_epochs: unknown key. Did you mean corpus.max_epochs?"),
        (HEAD + RULE + WEB + "qqq = 3", "corpus.0.qqq: unknown key. There are corpus.name, corpus.files, corpus.weight, c"),
        (HEAD + RULE + WEB.replace("[", "").replace("]", ""), "cannot be read as TOML: "),
        (HEAD + RULE + "[[corpus", "cannot be read as TOML: "),
        (HEAD + RULE, "corpus: is missing."),
        (HEAD.replace("steps", "corpus = []\nsteps") + RULE, "corpus: is missing; add a [[corpus]] with a name and files."),
        (HEAD + WEB, "rule: is missing."),
        ("", "plan: is missing.\ncorpus: is missing.\nrule: is missing."),
        (HEAD.replace('"run.packs"', '""') + RULE + WEB, "plan: is empty; name the plan's file."),
        (HEAD.replace('"run.packs"', "3") + RULE + WEB, 'plan: 3 is not text in quotes; give one such as "name".'),
        (HEAD.replace("5", "5.5") + RULE + WEB, "steps: 5.5 is not a whole number; give one such as 1."),
        (HEAD.replace("5", "true") + RULE + WEB, "steps: true is not a whole number; give one such as 1."),
        (HEAD.replace("5", "0") + RULE + WEB, "steps: at least 1, not 0."),
        (HEAD.replace("7", "-1") + RULE + WEB, "seed: at least 0, not -1."),
        (HEAD.replace("7", str(1 << 64)) + RULE + WEB, "seed: at most 18,446,744,073,709,551,615, not 18446744073709551616."),
        (HEAD.replace("7", "2026-11-23") + RULE + WEB, "seed: 2026-11-23 is not a whole number; give one such as 1."),
        (HEAD + RULE.replace("[[0, 64], [2, 128]]", "64") + WEB, "rule.context: 64 is not a list"),
        (HEAD + RULE.replace("64", '"x"') + WEB, 'rule.context.0.1: "x" is not a whole number; give one such as 1.'),
        (HEAD + RULE.replace("2, 128", "2") + WEB, "rule.context.1.1: is missing."),
        (HEAD + RULE.replace("2, 128", "2, 3, 4") + WEB, "rule.context.1: [2, 3, 4] is not a list of 2 entries."),
        (HEAD + RULE.replace("0, 64", "1, 64") + WEB, "rule.context: the first steps are [1, 2]; they must begin with 0"),
        (HEAD + RULE.replace("512", "500") + WEB, "rule.tokens_per_step: 500 is not a multiple of the context length 64; 448"),
        (HEAD + RULE + 'level = "yes"\n' + WEB, 'rule.level: "yes" is not true or false.'),
        (HEAD + RULE + 'long_documents = "drop"\n' + WEB, "rule.long_documents: there is no 'drop'; there are cut, keep."),
        (HEAD + RULE + "max_cost = inf\n" + WEB, "rule.max_cost: inf is not a finite number; give one such as 0.1."),
        (HEAD + RULE + "[rule.cost]\ntoken_cells = -1\n" + WEB, "rule.cost.token_cells: at least 0, not -1."),
        (HEAD + RULE + WEB.replace('["web-*"]', '"web-*"'), 'corpus.0.files: "web-*" is not a list; give one such as ["a", '),
        (HEAD + RULE + WEB.replace('["web-*"]', "[]"), "corpus.0.files: is empty; name prefixes of indexed files."),
        (HEAD + RULE + WEB.replace('name = "web"', ""), "corpus.0.name: is missing."),
        (HEAD + RULE + WEB.replace("3", "nan"), "corpus.0.weight: nan is not a finite number; give one such as 0.1."),
        (HEAD + RULE + WEB.replace("3", "0"), "corpus.0.weight: above 0, not 0.0."),
        (HEAD + RULE + WEB + "max_epochs = -1", "corpus.0.max_epochs: above 0, not -1.0."),
        (HEAD + RULE + WEB + BOOKS.replace("weight = 1.5", ""), "corpus.1: books has no weight, but web has one; give all or"),
        (HEAD + RULE + WEB + WEB, "corpus.1.name: another corpus is called web; give each a name of its own."),
        (HEAD.replace("steps = 5", "") + RULE + WEB, "corpus.0: web has no max_epochs: without steps a plan ends when"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_key(folder, text, sentence):
    assert refusal(folder, text).startswith(sentence)


def test_refusals_name_the_line(folder):
    def places(*parts: str) -> list[str]:
        with pytest.raises(DistattnError) as caught:
            load_pack_config(written(folder, *parts))
        return [line.removeprefix(f"{folder}/packs.toml").partition(": ")[0] for line in str(caught.value).splitlines()]

    # HEAD occupies lines 1 to 3, RULE 4 to 7, WEB 8 to 11, BOOKS 12 to 15
    assert places(HEAD, RULE, WEB, BOOKS.replace("1.5", '"x"')) == [":15"]
    assert places(HEAD, RULE, WEB, "nix = 1\n", BOOKS) == [":12"]
    assert places(HEAD, RULE, WEB, BOOKS.replace("weight = 1.5", "")) == [":12"]
    assert places(HEAD, RULE, WEB, BOOKS.replace('"books-0"', '\n"books-0", \n"nix"')) == [":16"]
    assert places(HEAD, RULE.replace("64", '"x"').replace("512", "1.5"), WEB, BOOKS) == [":5", ":6"]
    assert places(HEAD, RULE.replace("512", "500"), WEB) == [":6"]
    assert places(HEAD, RULE, "[rule.cost]\ntoken_cells = -1\n", WEB) == [":9"]
    assert places(HEAD, RULE.replace("=", "", 1), WEB) == [":5"]
    assert places(HEAD.replace("7", "-1"), RULE, WEB, WEB) == [":2", ":13"]
    assert places(RULE, WEB) == [""]


def test_all_unknown_keys_are_named_at_once(folder):
    lines = refusal(folder, HEAD, "sed = 1\n", RULE, WEB, "wieght = 2\n").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["corpus.0.wieght", "sed"]


def test_files_that_are_not_there_are_named(folder):
    missing = refusal(folder, HEAD, RULE, WEB.replace("web-*", "nix"))
    assert missing == f"corpus web: there is no {folder}/nix.idx; make it with distattn data tokenize."
    assert f"there is no {folder}/nix*.idx" in refusal(folder, HEAD, RULE, WEB.replace("web-*", "nix*"))


def test_files_that_are_named_twice_are_refused(folder):
    twice = refusal(folder, HEAD, RULE, WEB.replace('"web-*"', '"web-*", "./web-1.bin"'))
    assert twice.startswith(
        f"corpus web: {folder}/./web-1 is named twice; its documents would be read twice in an epoch."
    )
    again = refusal(folder, HEAD, RULE, WEB, BOOKS.replace("books-0", "web-1"))
    assert again.startswith(f"corpus books: {folder}/web-1 is named by web already")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DistattnError, match=r"nix.toml: cannot be read: No such file .*; name the TOML file"):
        load_pack_config(tmp_path / "nix.toml")
    (tmp_path / "packs.toml").write_bytes(b"plan = '\xff'")
    with pytest.raises(DistattnError, match=r"packs.toml: cannot be read as TOML: byte 8 is not UTF-8"):
        load_pack_config(tmp_path / "packs.toml")


def test_corpora_of_different_tokenizers_are_refused_in_any_order(folder):
    config = load_pack_config(written(folder, HEAD, RULE, WEB, BOOKS))
    corpora = open_corpora(config)
    assert vocabulary_of(corpora) is None
    manifest("a").save(f"{folder}/web-0")
    manifest("b").save(f"{folder}/books-0")
    for order in (corpora, corpora[::-1]):
        with pytest.raises(
            DistattnError, match="another tokenizer, or another --eos, than .*; tokenize all corpora of a"
        ):
            vocabulary_of(order)
    with pytest.raises(DistattnError, match=r"books-0.json: another tokenizer, or another --eos, than .*web-0.json"):
        make_configured_plan(config, corpora)
    assert not os.path.exists(config.plan)
    manifest("a").save(f"{folder}/books-0")
    # one file does not name its vocabulary
    assert vocabulary_of(corpora) is None
    manifest("a").save(f"{folder}/web-1")
    assert vocabulary_of(corpora) == 50_000


def test_a_plan_is_opened_as_it_was_made(folder):
    config = load_pack_config(written(folder, HEAD, RULE, WEB, BOOKS))
    corpora = open_corpora(config)
    with pytest.raises(DistattnError, match=r"run.packs: there is no such plan yet; make it with distattn data pack"):
        open_configured_plan(config, corpora)
    plan = make_configured_plan(config, corpora)
    opened = open_configured_plan(config, corpora)
    assert opened.digest == plan.digest and opened.steps == 5 and opened.seed == 7
    assert [source.weight for source in opened.sources] == [3.0, 1.5]


def test_a_plan_of_another_configuration_is_refused_with_the_key(folder):
    text = HEAD + RULE + WEB + BOOKS + "max_epochs = 9\n"
    config = load_pack_config(written(folder, text))
    make_configured_plan(config, open_corpora(config))
    for old, new, sentence in (
        ("seed = 7", "seed = 8", "was made with seed = 7, not 8"),
        ("steps = 5", "steps = 4", "was made with steps = 5, not 4"),
        ("window = 16", "window = 17", "was made with rule.window = 16, not 17"),
        ("[2, 128]", "[3, 128]", "was made with rule.context ="),
        ("weight = 3", "weight = 4", "was made with corpus web: weight = 3.0, not 4.0"),
        ("max_epochs = 9", "max_epochs = 8", "was made with corpus books: max_epochs = 9.0, not 8.0"),
        ('name = "web"', 'name = "net"', "was made of web, books, not of net, books"),
    ):
        other = load_pack_config(written(folder, text.replace(old, new)))
        with pytest.raises(DistattnError, match="make .* anew with distattn data pack --force") as caught:
            open_configured_plan(other, open_corpora(other))
        assert sentence in str(caught.value)


def test_a_plan_that_ends_before_its_corpora_is_refused_where_no_steps_are_named(folder):
    text = HEAD + RULE + (WEB + BOOKS).replace("weight", "max_epochs")
    config = load_pack_config(written(folder, text))
    make_configured_plan(config, open_corpora(config))
    whole = load_pack_config(written(folder, text.replace("steps = 5\n", "")))
    corpora = open_corpora(whole)
    with pytest.raises(DistattnError, match="was made with steps = 5, not none"):
        open_configured_plan(whole, corpora)
    plan = make_configured_plan(whole, corpora)
    assert open_configured_plan(whole, corpora).steps == plan.steps > 5


def test_a_corpus_that_has_changed_is_refused(folder):
    config = load_pack_config(written(folder, HEAD, RULE, WEB, BOOKS))
    make_configured_plan(config, open_corpora(config))
    for suffix in (".bin", ".idx", ".xxh3"):
        os.unlink(f"{folder}/books-0{suffix}")
    write_corpus(folder, "books", [[300, 11, 499]])
    with pytest.raises(
        DistattnError, match=r"corpus books: its files \(.*books-0\) have changed since .*bring the files back"
    ):
        open_configured_plan(config, open_corpora(config))


def test_an_invalid_manifest_is_damage(folder):
    (folder / "web-0.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(DamagedDataError, match=r"web-0.json: was not written by distattn data tokenize"):
        vocabulary_of(open_corpora(load_pack_config(written(folder, HEAD, RULE, WEB))))
