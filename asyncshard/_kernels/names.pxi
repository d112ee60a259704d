# Strings read from a header, kept as UTF-8 in one block and found by hash: tensor names, metadata, weight_map keys.
#
# A record in an arena is the length of its content (LEB128: 7 bits a byte, least first) and the content. It is never
# longer than its JSON text by more than two bytes, so an arena stays within the size of the text it was read from.

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc, PyMem_RawRealloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport INT32_MAX, UINT32_MAX, UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


cdef enum:
    PREFIX_BYTES = 5  # the LEB128 form of any length below 2**35

cdef struct Text:
    const uint8_t *start
    size_t size

cdef struct Arena:
    uint8_t *bytes
    size_t used
    size_t capacity

cdef struct Strings:
    Arena arena
    uint32_t *offsets  # of each string's record in the arena
    size_t count
    size_t capacity
    uint32_t *slots  # 0, or the row plus one in the bits of row_mask and part of the hash in the others
    size_t slot_count
    uint32_t row_mask


cdef int reserve(void **block, size_t *capacity, size_t needed, size_t item_size) noexcept nogil:
    """Make room for `needed` items, growing by half; -1 when there is no memory."""
    cdef size_t grown
    cdef void *moved
    if needed <= capacity[0]:
        return 0
    grown = max(needed, capacity[0] + capacity[0] // 2 + 16)
    moved = PyMem_RawRealloc(block[0], grown * item_size)
    if moved == NULL:
        return -1
    block[0] = moved
    capacity[0] = grown
    return 0


cdef void give_back(void **block, size_t *capacity, size_t used, size_t item_size) noexcept nogil:
    """Return the unused end of a block to the system."""
    cdef void *moved
    if used < capacity[0]:
        moved = PyMem_RawRealloc(block[0], used * item_size + 1)
        if moved != NULL:
            block[0] = moved
            capacity[0] = used


cdef inline uint8_t *arena_draft(Arena *arena, size_t size) noexcept nogil:
    """Return room for a record's content of at most `size` bytes, or NULL; to append it will not move the arena."""
    if reserve(<void **> &arena.bytes, &arena.capacity, arena.used + PREFIX_BYTES + size, 1) < 0:
        return NULL
    return arena.bytes + arena.used + PREFIX_BYTES


cdef int arena_append(Arena *arena, const uint8_t *content, size_t size) noexcept nogil:
    """Add a record. `content` may be the draft itself, which lies beyond its prefix: hence memmove."""
    cdef size_t rest = size
    cdef uint8_t *target
    if reserve(<void **> &arena.bytes, &arena.capacity, arena.used + PREFIX_BYTES + size, 1) < 0:
        return -1
    target = write_varint(arena.bytes + arena.used, rest)
    memmove(target, content, size)
    arena.used = (target - arena.bytes) + size
    return 0


cdef inline uint8_t *write_varint(uint8_t *target, uint64_t value) noexcept nogil:
    while value >= 0x80:
        target[0] = <uint8_t> (value | 0x80)
        target += 1
        value >>= 7
    target[0] = <uint8_t> value
    return target + 1


cdef inline const uint8_t *read_varint(const uint8_t *source, uint64_t *value) noexcept nogil:
    cdef int shift = 0
    value[0] = source[0] & 0x7F
    while source[0] & 0x80:
        source += 1
        shift += 7
        value[0] |= <uint64_t> (source[0] & 0x7F) << shift
    return source + 1


cdef inline Text arena_record(const Arena *arena, size_t offset) noexcept nogil:
    cdef Text text
    cdef uint64_t size
    text.start = read_varint(arena.bytes + offset, &size)
    text.size = size
    return text


cdef inline Text strings_at(const Strings *strings, size_t row) noexcept nogil:
    return arena_record(&strings.arena, strings.offsets[row])


cdef inline str text_to_str(Text text):
    return PyUnicode_DecodeUTF8(<const char *> text.start, text.size, NULL)


cdef list rows_to_strs(const Strings *strings, const uint32_t *rows, size_t count):
    cdef size_t i
    cdef list found = []
    for i in range(count):
        found.append(text_to_str(strings_at(strings, rows[i])))
    return found


cdef inline bint texts_equal(Text a, Text b) noexcept nogil:
    return a.size == b.size and memcmp(a.start, b.start, a.size) == 0


# Names come from files that a stranger may have written. SipHash with a key that differs from process to process
# (from Python's own randomised hash) keeps them from choosing names that all fall into one slot.
cdef uint64_t SIP_KEY_0 = <uint64_t> (<Py_ssize_t> hash(b"asyncshard names 0"))
cdef uint64_t SIP_KEY_1 = <uint64_t> (<Py_ssize_t> hash(b"asyncshard names 1"))


cdef inline uint64_t rotated(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = rotated(v[1], 13) ^ v[0]
    v[3] = rotated(v[3], 16) ^ v[2]
    v[0] = rotated(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = rotated(v[1], 17) ^ v[2]
    v[3] = rotated(v[3], 21) ^ v[0]
    v[2] = rotated(v[2], 32)


cdef uint64_t text_hash(Text text) noexcept nogil:
    """SipHash-1-3 (Aumasson and Bernstein, 2012)."""
    cdef uint64_t v[4]
    cdef uint64_t word
    cdef size_t i = 0
    v[0] = SIP_KEY_0 ^ 0x736F6D6570736575ULL
    v[1] = SIP_KEY_1 ^ 0x646F72616E646F6DULL
    v[2] = SIP_KEY_0 ^ 0x6C7967656E657261ULL
    v[3] = SIP_KEY_1 ^ 0x7465646279746573ULL
    while i + 8 <= text.size:
        memcpy(&word, text.start + i, 8)
        v[3] ^= word
        sip_round(v)
        v[0] ^= word
        i += 8
    word = 0
    memcpy(&word, text.start + i, text.size - i)
    word |= <uint64_t> text.size << 56
    v[3] ^= word
    sip_round(v)
    v[0] ^= word
    v[2] ^= 0xFF
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef int strings_append(Strings *strings, Text text) noexcept nogil:
    """Add a string as the next row; it is not found before it is claimed."""
    if reserve(<void **> &strings.offsets, &strings.capacity, strings.count + 1, sizeof(uint32_t)) < 0:
        return -1
    strings.offsets[strings.count] = <uint32_t> strings.arena.used
    if arena_append(&strings.arena, text.start, text.size) < 0:
        return -1
    strings.count += 1
    return 0


cdef int strings_make_slots(Strings *strings, size_t rows) noexcept nogil:
    """Make an empty table of slots for as many rows. It will be full to 4/5: a slot's part of the hash tells other
    names apart without a look at them."""
    cdef size_t room = 0
    cdef size_t wanted = rows + rows // 4 + 2
    strings.row_mask = 1
    while strings.row_mask < rows + 1:
        strings.row_mask = strings.row_mask * 2 + 1
    if reserve(<void **> &strings.slots, &room, wanted, sizeof(uint32_t)) < 0:
        return -1
    memset(strings.slots, 0, wanted * sizeof(uint32_t))
    strings.slot_count = wanted
    return 0


cdef inline int64_t strings_probe(const Strings *strings, Text text, uint64_t text_hashed, size_t *slot) noexcept nogil:
    """Return the row that holds `text`, or -1 and the free slot where it belongs."""
    cdef size_t position = <size_t> (((text_hashed >> 32) * strings.slot_count) >> 32)
    cdef uint32_t tag = <uint32_t> text_hashed & ~strings.row_mask
    cdef uint32_t entry
    cdef size_t row
    while True:
        entry = strings.slots[position]
        if entry == 0:
            slot[0] = position
            return -1
        if (entry & ~strings.row_mask) == tag:
            row = (entry & strings.row_mask) - 1
            if texts_equal(strings_at(strings, row), text):
                return row
        position += 1
        if position == strings.slot_count:
            position = 0


cdef int64_t strings_claim(Strings *strings, size_t row) noexcept nogil:
    """Make `row` findable, or return the earlier row that holds the same string; -1 when it is new."""
    cdef size_t slot
    cdef Text text = strings_at(strings, row)
    cdef uint64_t text_hashed = text_hash(text)
    cdef int64_t earlier = strings_probe(strings, text, text_hashed, &slot)
    if earlier < 0:
        strings.slots[slot] = (<uint32_t> text_hashed & ~strings.row_mask) | <uint32_t> (row + 1)
    return earlier


cdef int64_t strings_find(const Strings *strings, Text text) noexcept nogil:
    cdef size_t slot
    if strings.slots == NULL:
        return -1
    return strings_probe(strings, text, text_hash(text), &slot)


cdef Py_ssize_t strings_find_str(const Strings *strings, object name) except -2:
    """Find a Python string; one that UTF-8 cannot spell (a lone surrogate) is in no file."""
    cdef Py_ssize_t size
    cdef Text text
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    try:
        text.start = <const uint8_t *> PyUnicode_AsUTF8AndSize(name, &size)
    except UnicodeEncodeError:
        return -1
    text.size = size
    return <Py_ssize_t> strings_find(strings, text)


cdef void strings_fit(Strings *strings) noexcept nogil:
    give_back(<void **> &strings.arena.bytes, &strings.arena.capacity, strings.arena.used, 1)
    give_back(<void **> &strings.offsets, &strings.capacity, strings.count, sizeof(uint32_t))


cdef size_t strings_nbytes(const Strings *strings) noexcept nogil:
    return strings.arena.capacity + (strings.capacity + strings.slot_count) * sizeof(uint32_t)


cdef void strings_free(Strings *strings) noexcept nogil:
    PyMem_RawFree(strings.arena.bytes)
    PyMem_RawFree(strings.offsets)
    PyMem_RawFree(strings.slots)
    memset(strings, 0, sizeof(Strings))
