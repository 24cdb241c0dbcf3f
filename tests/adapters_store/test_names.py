import pytest

from adapters_store.errors import Invalid
from adapters_store.names import MAX_NAME, NameField, check_file_name, check_name

FIELDS: tuple[NameField, ...] = ("tenant", "adapter_id", "user_id")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["a", "A-1_b.c", "org/name", "ft:base:org::7", ".hidden", "a/b/c", "x" * MAX_NAME])
def test_plain_names_are_returned_as_they_are(field: NameField, value: str) -> None:
    assert check_name(field, value) is value


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        "",
        "x" * (MAX_NAME + 1),
        "..",
        "a/../b",
        "a..b",
        "../etc/passwd",
        "/etc",
        "a/",
        "a//b",
        ".",
        "./a",
        "a/.",
        "a\\b",
        "a b",
        "a\n",
        "\x00",
        "naïve",
        "\u202e",
        "\ud800",
        "a%2e",
        "~root",
        "a?b",
        "a#b",
        "'; drop table adapters",
    ],
)
def test_other_names_are_refused_by_field_rule_and_value(field: NameField, value: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_name(field, value)
    assert (refused.value.field, refused.value.value) == (field, value)
    assert str(refused.value).startswith(f"{field}: m")


def test_the_length_rule_names_the_limit_and_the_length() -> None:
    with pytest.raises(Invalid, match=r"^user_id: must have 1 to 128 characters, has 2000000, got 'xxx") as refused:
        check_name("user_id", "x" * 2_000_000)
    assert len(str(refused.value)) < 250


def test_users_and_tenants_may_be_email_addresses_and_adapters_may_not() -> None:
    assert check_name("user_id", "ann+test@example.org")
    assert check_name("tenant", "ann@example.org")
    with pytest.raises(Invalid, match=r"letters, digits and - _ \. : / only"):
        check_name("adapter_id", "support@2")


@pytest.mark.parametrize(
    "value",
    [
        "adapter_config.json",
        ".gitattributes",
        "pytorch adapter.bin",
        "größe.json",
        "lora/adapter_config.json",
        ".a/b..c",
        f"{'x' * MAX_NAME}/{'y' * MAX_NAME}",
    ],
)
def test_plain_file_names_are_returned_as_they_are(value: str) -> None:
    assert check_file_name(value) is value


BAD_COMPONENTS = ("", ".", "..", "...", "a\\b", "a\x00", "a\nb", "\ud800", "x" * (MAX_NAME + 1))


@pytest.mark.parametrize("value", [*BAD_COMPONENTS, "/", "a/b/c", "a//b", "/a/b", "C:\\a/b"])
def test_other_file_names_are_refused(value: str) -> None:
    with pytest.raises(Invalid, match=r"^files: a file name must"):
        check_file_name(value)


@pytest.mark.parametrize("component", BAD_COMPONENTS)
def test_part_and_file_are_each_held_to_the_rules(component: str) -> None:
    for value in (f"{component}/file", f"part/{component}"):
        with pytest.raises(Invalid, match=r"^files: a file name must"):
            check_file_name(value)
