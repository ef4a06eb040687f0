import hashlib

from tensorwire_server.scheduling.prefixes import extend_digests, root_digest


def names(tokens: list[int], root: bytes = b"r", page_tokens: int = 4) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, root, tokens, len(tokens), page_tokens)
    return digests


def test_a_page_is_named_by_the_sha_256_of_its_tokens_behind_the_name_before() -> None:
    first = hashlib.sha256(b"r" + bytes.fromhex("01000000 02000000 03000000 ffffff7f")).digest()
    second = hashlib.sha256(first + bytes.fromhex("05000000 06000000 07000000 08000000")).digest()
    assert names([1, 2, 3, 2**31 - 1, 5, 6, 7, 8, 9]) == [first, second]


def test_names_grow_with_the_text_and_stay() -> None:
    digests = names([1, 2, 3, 4, 5])
    extend_digests(digests, b"r", [1, 2, 3, 4, 5, 6, 7, 8], 8, 4)
    assert digests == names([1, 2, 3, 4, 5, 6, 7, 8])


def test_one_token_changes_the_names_of_its_page_and_of_all_behind_it() -> None:
    before, after = names([1] * 12), names([1] * 4 + [2] + [1] * 7)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_model_and_tenant_are_told_apart_wherever_the_border_lies() -> None:
    roots = {root_digest(model, tenant) for model, tenant in [("ab", "c"), ("a", "bc"), ("ab", "")]}
    assert len(roots) == 3
