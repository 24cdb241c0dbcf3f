import pytest

from adapters_store.errors import Invalid, NotFound, StoreError, TooLarge, Unavailable, disk_errors


def test_every_error_is_one_line_however_long_the_value() -> None:
    for error in (NotFound("adapter", "x\n" * 10_000), Invalid("limit", "must be small", 10**1000), TooLarge(1, 2)):
        assert isinstance(error, StoreError)
        assert "\n" not in str(error)
        assert len(str(error)) < 200


def test_a_disk_error_keeps_its_reason_and_drops_its_path() -> None:
    with pytest.raises(Unavailable) as failed, disk_errors():
        raise OSError(28, "No space left on device", "/tenants/acme")
    assert str(failed.value) == "the store's disk failed: No space left on device"
    assert isinstance(failed.value.__cause__, OSError)
