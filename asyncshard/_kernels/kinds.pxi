# Tensors of one kind: of one dtype and shape, with names that are alike but for their numbers. A checkpoint of a
# hundred thousand tensors has a few dozen kinds, and what is decided for one tensor of a kind holds for all.

cdef enum:
    NO_NAMES
    NUMBERED_PARTS  # a part between dots that is a number stands as *
    ALL_DIGITS  # each run of digits stands as *

cdef dict SPELLINGS = {"": NO_NAMES, "parts": NUMBERED_PARTS, "digits": ALL_DIGITS}


cdef inline bint is_decimal(uint8_t octet) noexcept nogil:
    return c'0' <= octet <= c'9'


cdef inline bint is_part(Text name, size_t start, size_t stop) noexcept nogil:
    return (start == 0 or name.start[start - 1] == c'.') and (stop == name.size or name.start[stop] == c'.')


cdef uint8_t *write_alike(uint8_t *target, Text name, int spelling) noexcept nogil:
    """Write a name with `*` for its numbers, which makes it no longer; return the end."""
    cdef size_t i = 0
    cdef size_t end
    cdef bint is_number
    while i < name.size:
        end = i
        while end < name.size and is_decimal(name.start[end]):
            end += 1
        is_number = end > i and (spelling == ALL_DIGITS or is_part(name, i, end))
        if is_number:
            target[0] = c'*'
            target += 1
        else:
            if end == i:
                end += 1
            memcpy(target, name.start + i, end - i)
            target += end - i
        i = end
    return target


cdef int number_kinds(
    const Strings *names,
    const uint8_t *codes,
    const Arena *shapes,
    const uint32_t *shape_offsets,
    int spelling,
    Strings *seen,
    int *kind_of,
    int64_t *firsts,
) noexcept nogil:
    """Number the kinds in order of their first tensors, which go to `firsts`; -1 when there is no memory.

    Without `codes` it is the names alone. A kind is spelled in `seen`: dtype, shape with its length, name.
    """
    cdef size_t row, used
    cdef int64_t earlier
    cdef uint8_t *draft
    cdef uint8_t *end
    cdef Text name, shape, kind
    shape.size = 0
    if strings_make_slots(seen, names.count) < 0:
        return -1
    for row in range(names.count):
        name = strings_at(names, row)
        if codes != NULL:
            shape = arena_record(shapes, shape_offsets[row])
        used = seen.arena.used
        draft = arena_draft(&seen.arena, 1 + PREFIX_BYTES + shape.size + name.size)
        if draft == NULL:
            return -1
        end = draft
        if codes != NULL:
            end[0] = codes[row]
            end = write_varint(end + 1, shape.size)
            memcpy(end, shape.start, shape.size)
            end += shape.size
        if spelling != NO_NAMES:
            end = write_alike(end, name, spelling)
        kind.start = draft
        kind.size = end - draft
        if strings_append(seen, kind) < 0:
            return -1
        earlier = strings_claim(seen, seen.count - 1)
        if earlier < 0:
            earlier = seen.count - 1
            firsts[earlier] = row
        else:
            seen.count -= 1
            seen.arena.used = used
        kind_of[row] = <int> earlier
    return 0


cdef tuple kinds_of(
    const Strings *names, const uint8_t *codes, const Arena *shapes, const uint32_t *shape_offsets, object spelling
):
    cdef Strings seen
    cdef int[::1] kind_of
    cdef int64_t[::1] firsts
    cdef int style, result
    if spelling not in SPELLINGS:
        raise ValueError(f"no such spelling of names: {spelling!r}")
    style = SPELLINGS[spelling]
    kinds_array = np.empty(names.count + 1, np.intc)  # one more than used, so that there is a first
    firsts_array = np.empty(names.count + 1, np.int64)
    kind_of = kinds_array
    firsts = firsts_array
    memset(&seen, 0, sizeof(Strings))
    with nogil:
        result = number_kinds(names, codes, shapes, shape_offsets, style, &seen, &kind_of[0], &firsts[0])
    count = seen.count
    strings_free(&seen)
    if result < 0:
        raise MemoryError("no memory to compare names")
    return kinds_array[: names.count], firsts_array[:count].copy()
