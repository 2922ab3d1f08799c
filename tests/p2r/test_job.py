import re
from pathlib import Path

import pytest

from p2r.errors import JobError
from p2r.job import JOB_VARIABLES, ignored_variables, json_schema, read_job, variants_of

GOOD = "kind: pretrain\nname: x\npretrain: {steps: 10, global_batch: 4}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        read_job(write(folder, text), overrides)
    return str(caught.value)


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "pretrian: {}\n")
    assert "pretrian: unknown key; did you mean pretrain?" in message
    message = refusal(tmp_path, GOOD.replace("steps: 10", "steps: 10, loss: {temprature: 1}"))
    assert "pretrain.loss.temprature: unknown key; did you mean temperature?" in message


def test_every_finding_is_listed_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "kind: pretrain\nname: x\npretrain: {steps: 0, global_batch: many}\n")
    assert "pretrain.steps" in message
    assert "pretrain.global_batch" in message


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "kind pipeline needs the sections ingest, publish, finetune" in refusal(
        tmp_path, GOOD.replace("kind: pretrain", "kind: pipeline")
    )


def test_rules_between_fields_are_checked(tmp_path: Path) -> None:
    assert "divisible by 16 (U-Net depth 4), got 100" in refusal(tmp_path, GOOD, "pretrain.image.size=100")
    assert "compile needs zero_stage 0, 1 or 2" in refusal(
        tmp_path, GOOD, "pretrain.compile=true", "pretrain.zero_stage=3"
    )
    assert "bf16 needs zero_stage 1, 2 or 3" in refusal(
        tmp_path, GOOD, "pretrain.precision=bf16", "pretrain.zero_stage=0"
    )


@pytest.mark.parametrize(
    ("sessions", "contrasts", "message"),
    [
        ("null", "[t1]", "pretrain.model.contrasts names t1, and ingest joins no contrasts: give ingest.sessions"),
        ("{contrasts: {t1: T1w}}", "null", "ingest.sessions makes records of t1: choose some of them"),
        ("{contrasts: {t1: T1w}}", "[t1, fliar]", "names fliar, ingest.sessions.contrasts t1: correct one of them"),
    ],
)
def test_contrasts_of_corpus_and_network_must_fit_before_the_corpus_is_made(
    tmp_path: Path, sessions: str, contrasts: str, message: str
) -> None:
    text = GOOD + f"ingest: {{sources: [/data], licence: CC0-1.0, sessions: {sessions}}}\n"
    assert message in refusal(tmp_path, text, f"pretrain.model.contrasts={contrasts}")


def test_a_balance_by_contrast_names_contrasts_of_the_network(tmp_path: Path) -> None:
    changes = ("pretrain.model.contrasts=[t1]", "pretrain.balance={by: contrast, weights: {t2: 1}}")
    assert "balance.weights names t2, model.contrasts t1: correct one of them" in refusal(tmp_path, GOOD, *changes)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("{name: dyn_unet}", 96, "pretrain.model.name: Input should be .*, got 'dyn_unet'; did you mean dynunet"),
        ("{name: dynunet, channels: [8, 8, 8, 8, 8, 8]}", 48, r"must be divisible by 32 \(U-Net depth 5\), got 48"),
        ("{name: unet, channels: [8, 16, 32]}", 4, r"divisible by 4 and larger \(U-Net depth 2\).*, got 4"),
        (
            "{name: swin_unetr, channels: [12, 24, 48, 96, 192]}",
            48,
            r"divisible by 32 \(Swin UNETR depth 5\), got 48",
        ),
        ("{name: swin_unetr}", 64, "channels of swin_unetr must be five that double from a multiple of 12, such as 24"),
        ("{channels: [8, 8, 8]}", 64, "channels of basic_unet must be five, got 3"),
        ("{level: 4}", 64, r"level must be below 4 \(U-Net depth 4\), got 4"),
        ("{normalisation: batch}", 64, "batch normalisation would make features depend on the other images"),
        ("{normalisation: group, feature_channels: 12}", 64, r"groups must divide .*, got 8 for \[12\]"),
        ("{in_channels: 2}", 64, "model.in_channels 2 needs the names of the contrasts: give model.contrasts"),
        ("{in_channels: 2, contrasts: [t1]}", 64, r"in_channels must be 1, the number of contrasts \(t1\), got 2"),
        ("{contrasts: [t1, flair, t1]}", 64, "must be different names, got t1 more than once"),
        ("{contrasts: [T1w]}", 64, "pattern"),
        ("{checkpoint_activations: encodr}", 64, "'none', 'encoder' or 'all', got 'encodr'; did you mean encoder"),
    ],
)
def test_a_network_that_cannot_be_is_refused_with_the_rule(tmp_path: Path, model: str, size: int, message: str) -> None:
    found = refusal(tmp_path, GOOD, f"pretrain.model={model}", f"pretrain.image.size={size}")
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.image={dimensions: 3, size: 40}", r"divisible by 16 \(U-Net depth 4\), got 40"),
        ("pretrain.image={dimensions: 4, size: 32}", "pretrain.image.dimensions"),
        ("pretrain.compile=max", "pretrain.compile.*reduce-overhead"),
        ("pretrain.equivariance_interval=-1", "pretrain.equivariance_interval.*greater than or equal to 0"),
        ("pretrain.loss.name=infonce", "pretrain.loss.name.*did you mean info_nce"),
        ("pretrain.loss.foreground_share=1.1", "pretrain.loss.foreground_share.*less than or equal to 1"),
        (
            "pretrain.loss={name: barlow_twins, learn_temperature: true}",
            "learn_temperature needs name info_nce: barlow_twins has no temperature",
        ),
        ("pretrain.loss.pixel_pairs_per_image=0", "pretrain.loss.pixel_pairs_per_image.*greater than 0"),
        ("pretrain.views={rotation: 90}", "pretrain.views.rotation: unknown key"),
    ],
)
def test_a_step_that_cannot_be_is_refused_where_the_job_is_read(tmp_path: Path, override: str, message: str) -> None:
    found = refusal(tmp_path, GOOD, override)
    assert re.search(message, found), found


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_network_takes_planes_and_volumes(tmp_path: Path, dimensions: int) -> None:
    overrides = (
        "pretrain.model={name: residual_dynunet, channels: [8, 16, 32], level: 1, channels_last: true, "
        "checkpoint_activations: 2, normalisation: group}",
        f"pretrain.image={{size: 8, dimensions: {dimensions}}}",
    )
    job = read_job(write(tmp_path, GOOD), overrides)
    assert job.pretrain is not None
    assert (job.pretrain.model.size_divisor, job.pretrain.model.stride) == (4, 2)


def test_an_override_reaches_any_field(tmp_path: Path) -> None:
    job = read_job(write(tmp_path, GOOD), ("pretrain.views.geometry.rotation_deg=30", "resources.num_workers=3"))
    assert job.pretrain is not None
    assert job.pretrain.views.geometry.rotation_deg == 30
    assert job.resources.num_workers == 3


def test_an_override_of_a_value_s_child_is_refused(tmp_path: Path) -> None:
    assert "kind is a value and has no keys below it" in refusal(tmp_path, GOOD, "kind.x=1")
    assert "write KEY=VALUE" in refusal(tmp_path, GOOD, "pretrain.steps")


@pytest.mark.parametrize(
    "line",
    [
        "aws_secret_access_key: x",
        "storage: s3://key:secret@host/bucket",
        "description: AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_a_secret_in_a_job_file_is_refused_without_being_repeated(tmp_path: Path, line: str) -> None:
    message = refusal(tmp_path, GOOD + line + "\n")
    assert "looks like a secret" in message
    assert "environment only" in message
    assert line.partition(": ")[2] not in message.replace(str(tmp_path), "") or line.endswith(" x")


def test_a_key_on_the_command_line_that_is_deeper_than_any_job_is_refused(tmp_path: Path) -> None:
    assert "a key has at most 32 parts, got 3,001" in refusal(tmp_path, GOOD, "a." * 3000 + "b=1")


def test_a_job_that_is_wrong_everywhere_is_refused_in_a_message_that_can_be_read(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "".join(f"key{n}: 1\n" for n in range(2000)), f"name={'X' * 100_000}")
    assert "key0: unknown key" in message and "more" in message and len(message) < 10_000


TOKEN = "a1B2" * 10
SECRETS = {
    "hugging face": f"hf_{TOKEN}",
    "github": f"ghp_{TOKEN}",
    "github, fine-grained": f"github_pat_{TOKEN}",
    "bearer": f"Authorization: Bearer {TOKEN}",
    "basic": f"Basic {TOKEN}==",
    "aws": "AKIA" + "ABCDEFGH12345678",
    "presigned": f"https://b.example/k?X-Amz-Signature={TOKEN}",
    "presigned, old": f"https://b.example/k?Expires=1&Signature={TOKEN}",
    "azure": f"https://b.example/k?sv=2024&sig={TOKEN}",
    "user and password": f"https://me:{TOKEN}@b.example/k",
    "user": f"s3://{TOKEN}@bucket/k",
    "web token": f"eyJ{TOKEN}.eyJ{TOKEN}.{TOKEN}",
    "presigned, Google": f"https://b.example/k?X-Goog-Credential=me&X-Goog-Signature={TOKEN}",
    "presigned, Alibaba": f"https://b.example/k?x-oss-signature={TOKEN}",
    "token in a fragment": f"https://b.example/k#access_token={TOKEN}",
    "web hook": f"https://hooks.slack.com/services/T0/B0/{TOKEN}",
    "connection string": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={TOKEN}==",
    "another connection string": f"Server=h;User Id=u;Password={TOKEN}",
    "stripe": f"sk_live_{TOKEN}",
    "npm": f"npm_{TOKEN}",
    "private key": f"-----BEGIN OPENSSH PRIVATE KEY-----{TOKEN}",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_like_a_secret_is_refused_wherever_it_comes_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file, in an override, in a variable that is filled in, and in the default storage."""
    secret = SECRETS[name]
    monkeypatch.setenv("P2R_PLACE", secret)
    said = [refusal(tmp_path, GOOD + f"publish: {{name: x, description: {secret!r}}}\n")]
    said += [refusal(tmp_path, GOOD, f"publish.description={secret!r}")]
    said += [refusal(tmp_path, GOOD + "storage: ${P2R_PLACE}\n")]
    said += [refusal(tmp_path, GOOD + f"storage: '/data/${{P2R_UNSET:-{secret}}}'\n")]
    monkeypatch.setenv("P2R_PLACE", secret[3:])  # the whole is a secret, no part of it is
    said += [refusal(tmp_path, GOOD + f"metrics: {{folder: '{secret[:3]}${{P2R_PLACE}}'}}\n")]
    monkeypatch.setenv("P2R_STORAGE", f"/data/{secret}")
    said += [refusal(tmp_path, GOOD)]
    for message in said:
        assert "secret" in message and "environment only" in message and TOKEN not in message, message


@pytest.mark.parametrize(
    "text", ["Bearer of bad news", "basic segmentation of hearts", "me@example.org", "file:///data/a@b", "s3://b/k?x=1"]
)
def test_what_only_resembles_a_secret_is_not_refused(text: str, tmp_path: Path) -> None:
    read_job(write(tmp_path, GOOD + f"publish: {{name: x, description: {text!r}}}\n"))


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "P2R_PSEUDONYM_KEY", "MY_TOKEN", "SOME_PASSWORD"])
def test_a_variable_with_the_name_of_a_secret_is_never_filled_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "planted-value")
    message = refusal(tmp_path, GOOD + f"storage: s3://bucket/${{{name}}}\n")
    assert f"storage: environment variable {name} holds a secret" in message and "planted" not in message


def test_variables_are_filled_in_where_a_path_or_url_is_and_refused_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_HERE", "/here")
    text = """
kind: ablation
name: x
storage: ${P2R_HERE}/storage
metrics: {folder: "${P2R_HERE}/metrics"}
ingest: {sources: ["${P2R_HERE}/a", "/b"], licence: "${P2R_HERE}", subjects_of: {task: "${P2R_HERE}/t.yaml"}}
pretrain: {steps: 2, global_batch: 4, init_from: "${P2R_HERE}/w"}
publish: {name: x}
finetune: {tasks: ["${P2R_HERE}/t.yaml"], backbone: "${P2R_HERE}/b", score_on: validation}
variants: {a: {pretrain.corpus: "${P2R_HERE}/d", pretrain.steps: 3}}
"""
    job = read_job(write(tmp_path, text))
    assert job.ingest and job.pretrain and job.finetune and job.metrics
    assert (job.storage, job.metrics.folder, job.ingest.sources) == (
        "/here/storage",
        "/here/metrics",
        ("/here/a", "/b"),
    )
    assert (
        job.ingest.licence == "/here"
        and job.ingest.subjects_of
        and job.ingest.subjects_of.task == "/here/t.yaml" == job.finetune.tasks[0]
    )
    assert job.pretrain.init_from == "/here/w"
    other = read_job(write(tmp_path, text), ("ingest=null", "pretrain.corpus=[{url: '${P2R_HERE}/c'}]"))
    assert other.pretrain and other.pretrain.corpus and other.pretrain.corpus[0].url == "/here/c"  # type: ignore[union-attr]
    assert job.finetune.backbone == "/here/b" and job.variants["a"]["pretrain.corpus"] == "/here/d"

    for override in ("publish.description", "ingest.cohort", "name", "variants.a.publish.name"):
        value = "{publish.name: '${P2R_HERE}'}" if override.startswith("variants") else "'x ${P2R_HERE:-y}'"
        override = "variants.a" if override.startswith("variants") else override
        message = refusal(tmp_path, text, f"{override}={value}")
        assert override in message and "${P2R_HERE} is not filled in here, because this field is published" in message


def test_a_key_that_commands_a_terminal_is_named_without_its_commands(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + '"x\\x1b[2J\\nvalid    y": 1\n')
    assert "x?[2J?valid    y: unknown key" in message


def test_an_unset_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P2R_NOWHERE", raising=False)
    assert "environment variable P2R_NOWHERE is not set" in refusal(tmp_path, GOOD + "storage: ${P2R_NOWHERE}/x\n")
    unset: dict[str, str] = {}
    read_job(write(tmp_path, GOOD + "storage: s3://${P2R_NOWHERE}/x\n"), unset=unset)
    assert list(unset) == ["P2R_NOWHERE"]


def test_all_unset_variables_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    ingest = (
        "kind: ingest\nname: x\ningest: {sources: [a], licence: '${P2R_LICENCE}', provenance: '${P2R_PROVENANCE}'}\n"
    )
    message = refusal(tmp_path, ingest)
    assert "variables P2R_LICENCE, P2R_PROVENANCE are not set (ingest.licence, ingest.provenance)" in message


VIRTUAL = "kind: ingest\nname: x\ningest: {sources: ['template://icbm152'], licence: LicenseRef-ICBM-152, provenance: Virtual subjects}\n"


def test_statements_about_virtual_subjects_never_enter_a_corpus_of_real_scans(tmp_path: Path) -> None:
    read_job(write(tmp_path, VIRTUAL))
    message = refusal(tmp_path, VIRTUAL, "ingest.sources=[/data/mine]", "ingest.cohort=icbm152")
    assert "licence, provenance, cohort speak of virtual subjects" in message and "/data/mine" in message
    stated = ("ingest.sources=[/data/mine]", "ingest.licence=CC0-1.0", "ingest.provenance=Ours")
    read_job(write(tmp_path, VIRTUAL), stated)


def test_a_corpus_that_is_named_beside_one_that_is_made_is_refused(tmp_path: Path) -> None:
    text = GOOD + "ingest: {sources: [a], licence: CC0-1.0}\n"
    read_job(write(tmp_path, text))
    message = refusal(tmp_path, text, "pretrain.corpus=s3://bucket/corpus")
    assert "pretrain.corpus" in message and "ingest" in message and "s3://bucket/corpus" in message


def test_variables_that_a_job_ignores_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = write(tmp_path, GOOD)
    assert ignored_variables(path, read_job(path)) == []
    monkeypatch.setenv("P2R_SCANS", "/data/mine")
    (note,) = ignored_variables(path, read_job(path))
    assert note.startswith("P2R_SCANS is set, but job ") and "--set ingest.sources=" in note
    path = write(tmp_path, "kind: ingest\nname: x\ningest: {sources: ['${P2R_SCANS}'], licence: CC0-1.0}\n")
    assert ignored_variables(path, read_job(path)) == []


def test_storage_defaults_to_the_environment_then_to_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_STORAGE", "s3://bucket/runs")
    assert read_job(write(tmp_path, GOOD)).storage == "s3://bucket/runs/x"
    monkeypatch.delenv("P2R_STORAGE")
    assert read_job(write(tmp_path, GOOD)).storage == str(Path.home() / "p2r-runs/x")


def test_relative_paths_of_weights_are_resolved_where_the_command_runs_since_workers_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = """
kind: ablation
name: x
ingest: {sources: ["/a"], licence: MIT}
pretrain: {steps: 2, global_batch: 4, init_from: checkpoint_final.pth}
publish: {name: x}
finetune: {tasks: [t.yaml], backbone: "runs/b@stable", score_on: validation}
variants: {a: {pretrain.init_from: w/a.pth}, b: {pretrain.init_from: "s3://bucket/b", pretrain.steps: 3}}
"""
    job = read_job(write(tmp_path, text))
    assert job.pretrain and job.pretrain.init_from == f"{here}/checkpoint_final.pth"
    assert job.finetune and job.finetune.backbone == f"{here}/runs/b@stable"
    found = {name: variant.pretrain.init_from for name, variant in variants_of(job).items() if variant.pretrain}
    assert found == {"a": f"{here}/w/a.pth", "b": "s3://bucket/b"}


def test_a_relative_storage_is_refused(tmp_path: Path) -> None:
    assert "absolute path, got 'runs/x'" in refusal(tmp_path, GOOD + "storage: runs/x\n")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be a mapping that begins with `kind:`, found NoneType"),
        ("- a\n", "must be a mapping that begins with `kind:`, found list"),
        ("7", "must be a mapping that begins with `kind:`, found int"),
        ("kind: [\n", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_rubbish_is_refused_by_name(tmp_path: Path, text: str, rule: str) -> None:
    for overrides in ((), ("pretrain.steps=3",)):
        assert f"job {tmp_path}/job.yaml {rule}" in refusal(tmp_path, text, *overrides)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"absent\.yaml cannot be read"):
        read_job(tmp_path / "absent.yaml")


def test_jobs_are_frozen(tmp_path: Path) -> None:
    job = read_job(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        job.name = "y"  # type: ignore[misc]


def test_every_field_of_the_schema_says_what_it_is() -> None:
    schema = json_schema()
    for name, model in {"Job": schema, **schema["$defs"]}.items():
        for field, description in model.get("properties", {}).items():
            assert description.get("description"), f"{name}.{field} has no text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name: again", "line .*: key 'name' is twice in one mapping, first on line"),
        ("retries: " + "9" * 100, "is not a valid int"),
        ("metrics: {port: .nan}", "not a finite number"),
        ("retries: !!set {a}", "is not read"),
        ("variants: " + "[" * 5000, "mappings and lists may be 32 deep"),
        ("# " + "x" * 2**20, "more than the 1,048,576"),
    ],
)
def test_a_job_file_that_leaves_a_bound_is_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    found = refusal(tmp_path, f"{GOOD}{line}\n")
    assert found.startswith("job ")
    assert re.search(message, found)
