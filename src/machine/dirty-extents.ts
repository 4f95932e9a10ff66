/**
 * Most pieces that a layer of memory has: each is a mapping of its own in a process that restores it, which may have
 * 65530 in all (vm.max_map_count).
 */
export const MAX_EXTENTS = 1024;

/**
 * The pieces that written pages make, each first page and number of pages. Pages between two that are near to each other
 * are taken with them, and marked as well, so that there are few pieces.
 * @param pages a byte for each page, not 0 where it was written.
 */
export function dirtyExtents(pages: Uint8Array): [page: number, count: number][] {
  for (let gap = 1; ; gap *= 2) {
    const extents: [number, number][] = [];
    for (let page = pages.indexOf(1); page >= 0; ) {
      const last = extents.at(-1);
      let end = page + 1;
      while (pages[end]) end++;
      if (last && page - (last[0] + last[1]) <= gap) last[1] = end - last[0];
      else extents.push([page, end - page]);
      page = pages.indexOf(1, end);
    }
    if (extents.length > MAX_EXTENTS) continue;
    for (const [page, count] of extents) pages.fill(1, page, page + count);
    return extents;
  }
}
