"""Keys and values of the prefix cache: pages by number, copied out of sequences and into them.

Dimensions: L layers, H heads (of keys), T tokens of a page, D head size.
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
    """Holds pages of equal size; the size is that of the first one saved."""

    def __init__(self, geometry: KVGeometry) -> None:
        self._geometry = geometry
        self._page_tokens = 0
        self._page_elements = 0
        self._extents: dict[int, ZeroedTensor] = {}  # on a CPU: by page // _PAGES_OF_EXTENT
        self._alone: dict[int, torch.Tensor] = {}  # on a device: by page
        self._held: set[int] = set()

    @property
    def num_pages(self) -> int:
        """Pages that hold something."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes that these take."""
        return len(self._held) * self._page_elements * self._geometry.dtype.itemsize

    def save(self, page: int, kv_L2HTD: torch.Tensor) -> None:
        """Copy one page's keys and values; what the page held before is gone."""
        if not self._page_tokens:
            self._page_tokens = kv_L2HTD.shape[3]
            self._page_elements = kv_L2HTD.numel()
            if self._geometry.device.type == "cpu":  # pages of the system are given back alone
                itemsize = self._geometry.dtype.itemsize
                self._page_elements = round_up(kv_L2HTD.numel() * itemsize) // itemsize
        assert kv_L2HTD.shape[3] == self._page_tokens, "pages differ in size"
        self._held.add(page)
        self.page(page).copy_(kv_L2HTD)

    def page(self, page: int) -> torch.Tensor:
        """Return (L, 2, H, T, D): a view of what is saved under this number."""
        g = self._geometry
        shape = (g.num_layers, 2, g.num_heads, self._page_tokens, g.head_size)
        assert page in self._held, f"page {page} was never saved"
        if g.device.type != "cpu":
            if page not in self._alone:
                self._alone[page] = g.zeros(shape).tensor
            return self._alone[page]
        number, place = divmod(page, _PAGES_OF_EXTENT)
        extent = self._extents.get(number)
        if extent is None:
            extent = self._extents[number] = g.zeros((_PAGES_OF_EXTENT, self._page_elements))
        num_elements = g.num_layers * 2 * g.num_heads * self._page_tokens * g.head_size
        return extent.tensor[place, :num_elements].view(shape)

    def drop(self, page: int) -> None:
        """Free a page's memory; one that holds nothing is no error."""
        if page not in self._held:
            return
        self._held.remove(page)
        self._alone.pop(page, None)
        number, place = divmod(page, _PAGES_OF_EXTENT)
        if number in self._extents:
            self._extents[number].clear((place,))
