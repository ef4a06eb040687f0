"""Keys and values of the prefix cache: pages by number, copied out of sequences and into them.

Dimensions: L layers, H heads (of keys), T tokens that a page holds, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_server.engine.memory import round_up

if TYPE_CHECKING:
    import torch

    from tensorwire_server.engine.kv_cache import KVGeometry
    from tensorwire_server.engine.memory import ZeroedTensor

_PAGES_OF_EXTENT = 256  # mapped together; memory is taken page by page all the same


class PageStore:
    """Holds pages of equal size; the size is that of the first one saved. Not all are full."""

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self._page_tokens = 0
        self._page_elements = 0
        self._extents: dict[int, ZeroedTensor] = {}  # on a CPU: by page // _PAGES_OF_EXTENT
        self._alone: dict[int, torch.Tensor] = {}  # on a device: by page
        self._held: dict[int, int] = {}  # by page: how many tokens

    @property
    def num_pages(self) -> int:
        """Pages that hold something."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes that these take."""
        return len(self._held) * self._page_elements * self._geometry.dtype.itemsize

    def save(self, page: int, kv_L2HTD: torch.Tensor, page_tokens: int) -> None:
        """Copy up to `page_tokens` tokens into a page; what it held before is gone."""
        if not self._page_tokens:
            self._page_tokens = page_tokens
            self._page_elements = self._num_elements(page_tokens)
            if self._geometry.device.type == "cpu":  # pages of the system are given back alone
                itemsize = self._geometry.dtype.itemsize
                self._page_elements = round_up(self._page_elements * itemsize) // itemsize
        assert page_tokens == self._page_tokens, "pages differ in size"
        self._held[page] = kv_L2HTD.shape[3]
        self.page(page).copy_(kv_L2HTD)

    def page(self, page: int) -> torch.Tensor:
        """Return (L, 2, H, T, D): a view of what is saved under this number."""
        g = self._geometry
        assert page in self._held, f"page {page} was never saved"
        num_tokens = self._held[page]
        elements = self._elements(page)[: self._num_elements(num_tokens)]
        return elements.view(g.num_layers, 2, g.num_heads, num_tokens, g.head_size)

    def _elements(self, page: int) -> torch.Tensor:
        if self._geometry.device.type != "cpu":
            if page not in self._alone:
                self._alone[page] = self._geometry.zeros((self._page_elements,)).tensor
            return self._alone[page]
        number, place = divmod(page, _PAGES_OF_EXTENT)
        extent = self._extents.get(number)
        if extent is None:
            shape = (_PAGES_OF_EXTENT, self._page_elements)
            extent = self._extents[number] = self._geometry.zeros(shape)
        return extent.tensor[place]

    def _num_elements(self, num_tokens: int) -> int:
        g = self._geometry
        return g.num_layers * 2 * g.num_heads * num_tokens * g.head_size

    def drop(self, page: int) -> None:
        """Free a page's memory; one that holds nothing is no error."""
        if page not in self._held:
            return
        del self._held[page]
        self._alone.pop(page, None)
        number, place = divmod(page, _PAGES_OF_EXTENT)
        if number in self._extents:
            self._extents[number].clear((place,))
