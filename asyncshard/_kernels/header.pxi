# The header of a safetensors file (docs/format.md, rules 4 to 10), parsed into columns in the order of the file's data.
#
# Memory, for an entry of about 55 bytes of text: 24 for its Row and 13 for its name while the text is read, then 17
# for the columns and 5 for the hash slot. Together with the text that stays within 2.5 times the text's size.

import numpy as np

cimport cython

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer


cdef struct Dtype:
    const char *name
    size_t size
    uint32_t bits

cdef enum:
    DTYPE_COUNT = 22
    # Rows read between two offers of the core to another thread: the event loop's may wait for it, and where every core
    # is busy the scheduler would let it wait for a whole time slice of about 3 ms.
    ROWS_AT_ONCE = 256

# In the order of asyncshard.format.dtypes.DTYPES: a code is the place in this list.
cdef Dtype[DTYPE_COUNT] DTYPES_KNOWN = [
    Dtype(b"BOOL", 4, 8), Dtype(b"F4", 2, 4), Dtype(b"F6_E2M3", 7, 6), Dtype(b"F6_E3M2", 7, 6), Dtype(b"U8", 2, 8),
    Dtype(b"I8", 2, 8), Dtype(b"F8_E5M2", 7, 8), Dtype(b"F8_E4M3", 7, 8), Dtype(b"F8_E8M0", 7, 8),
    Dtype(b"F8_E4M3FNUZ", 11, 8), Dtype(b"F8_E5M2FNUZ", 11, 8), Dtype(b"I16", 3, 16), Dtype(b"U16", 3, 16),
    Dtype(b"F16", 3, 16), Dtype(b"BF16", 4, 16), Dtype(b"I32", 3, 32), Dtype(b"U32", 3, 32), Dtype(b"F32", 3, 32),
    Dtype(b"C64", 3, 64), Dtype(b"F64", 3, 64), Dtype(b"I64", 3, 64), Dtype(b"U64", 3, 64),
]

cdef struct Row:
    uint64_t begin
    uint64_t end
    uint32_t shape  # offset of its record in the arena of shapes
    uint8_t dtype

cdef struct Entries:
    # All entries of the text, in its order.
    Strings names
    Arena shapes
    Arena metadata  # records: key, value, key, value, ...
    size_t metadata_count
    bint has_metadata
    Row *rows
    size_t room
    size_t complete  # rows that are whole; one name more while an entry is read
    uint32_t *order  # the rows in file order; NULL when that is their own
    bint is_sorted

cdef Text METADATA_KEY
METADATA_KEY.start = <const uint8_t *> b"__metadata__"
METADATA_KEY.size = 12
cdef Text NO_KEY
NO_KEY.start = METADATA_KEY.start
NO_KEY.size = 0

cdef enum Field:
    FIELD_OTHER = 0
    FIELD_DTYPE = 1
    FIELD_SHAPE = 2
    FIELD_OFFSETS = 4


cdef inline Field field_of(Text key) noexcept nogil:
    if key.size == 5:
        if memcmp(key.start, b"dtype", 5) == 0:
            return FIELD_DTYPE
        if memcmp(key.start, b"shape", 5) == 0:
            return FIELD_SHAPE
    elif key.size == 12 and memcmp(key.start, b"data_offsets", 12) == 0:
        return FIELD_OFFSETS
    return FIELD_OTHER


cdef int read_dtype(Reader *reader, Arena *scratch, uint8_t *code) noexcept nogil:
    cdef Text text
    cdef uint8_t i
    cdef size_t start
    if peek(reader) != c'"':
        return fail_here(reader, FAULT_DTYPE)
    start = reader.position
    if read_text(reader, scratch, &text) < 0:
        return -1
    for i in range(DTYPE_COUNT):
        if text.size == DTYPES_KNOWN[i].size and memcmp(text.start, DTYPES_KNOWN[i].name, text.size) == 0:
            code[0] = i
            return 0
    return fail(reader, FAULT_DTYPE, start)


cdef int read_shape(Reader *reader, Arena *shapes, uint32_t *offset, uint64_t *elements) noexcept nogil:
    """Append the dimensions to `shapes`, each as a varint: never longer than its digits and comma."""
    cdef uint8_t *target
    cdef size_t used = 0
    cdef size_t start
    cdef uint64_t size
    cdef int more
    cdef bint is_first = True
    if peek(reader) != c'[':
        return fail_here(reader, FAULT_SHAPE)
    start = reader.position
    reader.position += 1
    elements[0] = 1
    while True:
        more = next_element(reader, is_first)
        if more < 0:
            return -1
        target = arena_draft(shapes, used + 10)
        if target == NULL:
            return fail(reader, FAULT_MEMORY, start)
        if more == 0:
            break
        if read_unsigned(reader, FAULT_SHAPE_INTEGER, &size) < 0:
            return -1
        if size != 0 and elements[0] > UINT64_MAX // size:
            return fail(reader, FAULT_SHAPE_OVERFLOW, start)
        elements[0] *= size
        used = write_varint(target + used, size) - target
        is_first = False
    offset[0] = <uint32_t> shapes.used
    if arena_append(shapes, target, used) < 0:
        return fail(reader, FAULT_MEMORY, start)
    return 0


cdef int read_offsets(Reader *reader, Row *row) noexcept nogil:
    cdef size_t start
    if peek(reader) != c'[':
        return fail_here(reader, FAULT_OFFSETS)
    start = reader.position
    reader.position += 1
    if read_unsigned(reader, FAULT_OFFSETS, &row.begin) < 0:
        return -1
    if peek(reader) != c',':
        return fail_here(reader, FAULT_OFFSETS)
    reader.position += 1
    if read_unsigned(reader, FAULT_OFFSETS, &row.end) < 0:
        return -1
    if peek(reader) != c']':
        return fail_here(reader, FAULT_OFFSETS)
    reader.position += 1
    if row.end < row.begin:
        return fail(reader, FAULT_OFFSETS_REVERSED, start)
    return 0


cdef int check_size(Reader *reader, const Row *row, uint64_t elements, size_t start) noexcept nogil:
    """Check rule 8 (the number of bits) and rule 9."""
    cdef uint64_t bits = DTYPES_KNOWN[row.dtype].bits
    if elements > UINT64_MAX // bits:
        return fail(reader, FAULT_BITS_OVERFLOW, start)
    bits *= elements
    if bits % 8 != 0:
        return fail(reader, FAULT_PART_BYTE, start)
    if bits // 8 != row.end - row.begin:
        reader.expected = bits // 8
        reader.found = row.end - row.begin
        return fail(reader, FAULT_SIZE, start)
    return 0


cdef int read_entry(Reader *reader, Entries *entries, Row *row) noexcept nogil:
    cdef Text key
    cdef Field field
    cdef int seen = 0
    cdef int more
    cdef uint64_t elements = 0
    cdef size_t start
    cdef bint is_first = True
    if peek(reader) != c'{':
        return fail_here(reader, FAULT_ENTRY)
    start = reader.position
    reader.position += 1
    while True:
        more = next_member(reader, is_first, &entries.names.arena, &key)
        if more < 0:
            return -1
        if more == 0:
            break
        is_first = False
        field = field_of(key)
        if seen & field:
            return fail_here(reader, FAULT_FIELD_TWICE)
        seen |= field
        if field == FIELD_DTYPE:
            more = read_dtype(reader, &entries.names.arena, &row.dtype)
        elif field == FIELD_SHAPE:
            more = read_shape(reader, &entries.shapes, &row.shape, &elements)
        elif field == FIELD_OFFSETS:
            more = read_offsets(reader, row)
        else:
            more = skip_value(reader, 2, &entries.names.arena)
        if more < 0:
            return -1
    if not seen & FIELD_DTYPE:
        return fail(reader, FAULT_NO_DTYPE, start)
    if not seen & FIELD_SHAPE:
        return fail(reader, FAULT_NO_SHAPE, start)
    if not seen & FIELD_OFFSETS:
        return fail(reader, FAULT_NO_OFFSETS, start)
    return check_size(reader, row, elements, start)


cdef int read_metadata(Reader *reader, Entries *entries) noexcept nogil:
    cdef Strings keys  # its arena is that of the metadata, its rows the keys alone
    cdef int result
    if entries.has_metadata:
        return fail_here(reader, FAULT_METADATA_TWICE)
    entries.has_metadata = True
    memset(&keys, 0, sizeof(Strings))
    result = read_metadata_into(reader, &keys)
    entries.metadata = keys.arena
    entries.metadata_count = keys.count
    memset(&keys.arena, 0, sizeof(Arena))
    strings_free(&keys)
    return result


cdef int read_metadata_into(Reader *reader, Strings *keys) noexcept nogil:
    cdef Text text
    cdef int more
    cdef int64_t row
    cdef size_t opening
    cdef bint is_first = True
    if peek(reader) != c'{':
        return fail_here(reader, FAULT_METADATA)
    opening = reader.position
    reader.position += 1
    while True:
        more = next_member(reader, is_first, &keys.arena, &text)
        if more < 0:
            return -1
        if more == 0:
            break
        is_first = False
        if strings_append(keys, text) < 0:
            return fail(reader, FAULT_MEMORY, reader.position)
        if peek(reader) != c'"':
            return fail_here(reader, FAULT_METADATA_VALUE)
        if read_text(reader, &keys.arena, &text) < 0:
            return -1
        if arena_append(&keys.arena, text.start, text.size) < 0:
            return fail(reader, FAULT_MEMORY, reader.position)
    row = claim_all(keys)
    if row == -2:
        return fail(reader, FAULT_MEMORY, reader.position)
    if row >= 0:
        return fail(reader, FAULT_METADATA_KEY_TWICE, member_position(reader, opening, row, NO_KEY))
    return 0


cdef int64_t claim_all(Strings *strings) noexcept nogil:
    """Make every row findable. Return -1, or a row that equals an earlier one, or -2 when there is no memory."""
    cdef size_t row
    if strings_make_slots(strings, strings.count) < 0:
        return -2
    for row in range(strings.count):
        if strings_claim(strings, row) >= 0:
            return row
        if row % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
            sched_yield()
    return -1


cdef int read_entries(Reader *reader, Entries *entries, size_t max_tensors) noexcept nogil:
    """Read the whole text, by rules 4 to 9; names that occur twice are found later."""
    cdef Text key
    cdef Row row
    cdef int more
    cdef size_t count
    cdef uint64_t last = 0
    cdef bint is_first = True
    if check_utf8(reader) < 0:
        return -1
    if peek(reader) != c'{':
        return fail_here(reader, FAULT_TOP)
    reader.position += 1
    entries.is_sorted = True
    while True:
        more = next_member(reader, is_first, &entries.names.arena, &key)
        if more < 0:
            return -1
        if more == 0:
            break
        is_first = False
        if texts_equal(key, METADATA_KEY):
            if read_metadata(reader, entries) < 0:
                return -1
            continue
        count = entries.names.count
        if count == max_tensors:
            reader.expected = max_tensors
            return fail_here(reader, FAULT_TOO_MANY)
        if strings_append(&entries.names, key) < 0 or reserve(
            <void **> &entries.rows, &entries.room, count + 1, sizeof(Row)
        ) < 0:
            return fail(reader, FAULT_MEMORY, reader.position)
        if read_entry(reader, entries, &row) < 0:
            return -1
        if row.begin < last:
            entries.is_sorted = False
        last = row.end
        entries.rows[count] = row
        entries.complete += 1
        if count % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
            sched_yield()
    return check_end(reader)


cdef int sort_rows(Entries *entries) noexcept nogil:
    """Sort the rows by (begin, end, position in the header), by counting 11 bits of `begin` a pass, lowest bits first.

    Each pass keeps the order of equal rows, and empty tensors are put first. That suffices: if the offsets are legal,
    one of two tensors with the same `begin` and different ends is empty.
    """
    cdef uint32_t starts[2048]
    cdef uint32_t *spare
    cdef uint32_t total, number
    cdef size_t count = entries.names.count
    cdef size_t i, k
    cdef uint64_t highest = 0
    cdef int shift = 0
    entries.order = <uint32_t *> PyMem_RawRealloc(NULL, count * sizeof(uint32_t))
    spare = <uint32_t *> PyMem_RawRealloc(NULL, count * sizeof(uint32_t))
    if entries.order == NULL or spare == NULL:
        PyMem_RawFree(spare)
        return -1
    k = 0
    for i in range(count):
        highest = max(highest, entries.rows[i].begin)
        if entries.rows[i].begin == entries.rows[i].end:
            entries.order[k] = <uint32_t> i
            k += 1
    for i in range(count):
        if entries.rows[i].begin != entries.rows[i].end:
            entries.order[k] = <uint32_t> i
            k += 1
    while shift < 64 and highest >> shift != 0:
        memset(starts, 0, sizeof(starts))
        for i in range(count):
            starts[(entries.rows[i].begin >> shift) & 2047] += 1
        total = 0
        for i in range(2048):
            number = starts[i]
            starts[i] = total
            total += number
        for i in range(count):
            k = (entries.rows[entries.order[i]].begin >> shift) & 2047
            spare[starts[k]] = entries.order[i]
            starts[k] += 1
        entries.order, spare = spare, entries.order
        shift += 11
    PyMem_RawFree(spare)
    return 0


cdef inline size_t header_row(const Entries *entries, size_t row) noexcept nogil:
    """Return the position in the header of the `row`-th tensor of the file."""
    return row if entries.order == NULL else entries.order[row]


cdef int64_t check_contiguous(Reader *reader, const Entries *entries, uint64_t data_size) noexcept nogil:
    """Check rule 10. Return -1, or the row of the file at fault, or the number of rows when the end is."""
    cdef size_t i
    cdef const Row *row
    cdef uint64_t reached = 0
    for i in range(entries.names.count):
        row = &entries.rows[header_row(entries, i)]
        if row.begin != reached:
            reader.expected = reached
            reader.found = row.begin
            reader.fault = FAULT_CONTIGUITY
            return i
        reached = row.end
    if reached != data_size:
        reader.expected = data_size
        reader.found = reached
        reader.fault = FAULT_COVERAGE
        return entries.names.count
    return -1


cdef void entries_free(Entries *entries) noexcept nogil:
    strings_free(&entries.names)
    PyMem_RawFree(entries.shapes.bytes)
    PyMem_RawFree(entries.metadata.bytes)
    PyMem_RawFree(entries.rows)
    PyMem_RawFree(entries.order)
    memset(entries, 0, sizeof(Entries))


@cython.final
cdef class HeaderTable:
    """The tensors of one header, in file order; made by `parse_header_table` or `take`, and never changed."""

    cdef Strings names
    cdef Arena shapes
    cdef uint32_t *shape_offsets
    cdef Arena metadata_records
    cdef size_t metadata_count
    cdef int64_t *bounds  # in bounds_array: tensor i is from bounds[i] to bounds[i + 1] of the file
    cdef uint8_t *codes  # in codes_array
    cdef object bounds_array
    cdef object codes_array

    def __init__(self):
        raise TypeError("a HeaderTable is made by parse_header_table")

    def __dealloc__(self):
        strings_free(&self.names)
        PyMem_RawFree(self.shapes.bytes)
        PyMem_RawFree(self.shape_offsets)
        PyMem_RawFree(self.metadata_records.bytes)

    def __len__(self):
        return self.names.count

    def find(self, name):
        return strings_find_str(&self.names, name)

    def name(self, Py_ssize_t index):
        return text_to_str(strings_at(&self.names, self.checked(index)))

    def row(self, Py_ssize_t index):
        self.checked(index)
        return (
            text_to_str(strings_at(&self.names, index)),
            self.codes[index],
            self.shape(index),
            self.bounds[index],
            self.bounds[index + 1],
        )

    def kinds(self, spelling):
        return kinds_of(&self.names, self.codes, &self.shapes, self.shape_offsets, spelling)

    def take(
        self,
        const int64_t[::1] rows not None,
        shapes,
        const int[::1] kinds not None,
        *,
        int64_t data_start,
        metadata,
        names=None,
    ):
        return take_rows(self, rows, kinds, shapes, names, metadata, data_start)

    def metadata(self):
        cdef size_t i
        cdef Text key, value
        cdef size_t offset = 0
        cdef dict found = {}
        for i in range(self.metadata_count):
            key = arena_record(&self.metadata_records, offset)
            value = arena_record(&self.metadata_records, key.start + key.size - self.metadata_records.bytes)
            offset = value.start + value.size - self.metadata_records.bytes
            found[text_to_str(key)] = text_to_str(value)
        return found

    @property
    def starts(self):
        return self.bounds_array[: self.names.count]

    @property
    def stops(self):
        return self.bounds_array[1:]

    @property
    def dtype_codes(self):
        return self.codes_array

    @property
    def nbytes(self):
        return (
            strings_nbytes(&self.names)
            + self.shapes.capacity
            + self.metadata_records.capacity
            + self.names.count * (sizeof(uint32_t) + sizeof(int64_t) + sizeof(uint8_t))
            + sizeof(int64_t)
        )

    cdef int make_arrays(self, size_t count) except -1:
        cdef int64_t[::1] bounds
        cdef uint8_t[::1] codes
        bounds_array = np.empty(count + 1, np.int64)
        codes_array = np.empty(count + 1, np.uint8)  # one more than used, so that there is a first
        bounds = bounds_array
        codes = codes_array
        self.bounds = &bounds[0]
        self.codes = &codes[0]
        bounds_array.flags.writeable = False
        codes_array.flags.writeable = False
        self.bounds_array = bounds_array
        self.codes_array = codes_array[:count]
        return 0

    cdef Py_ssize_t checked(self, Py_ssize_t index) except -1:
        if not 0 <= index < <Py_ssize_t> self.names.count:
            raise IndexError(f"no tensor {index} among {self.names.count}")
        return index

    cdef tuple shape(self, size_t index):
        cdef Text record = arena_record(&self.shapes, self.shape_offsets[index])
        cdef const uint8_t *source = record.start
        cdef const uint8_t *end = source + record.size
        cdef uint64_t size
        cdef list sizes = []
        while source < end:
            source = read_varint(source, &size)
            sizes.append(size)
        return tuple(sizes)


cdef int fill_columns(HeaderTable table, Entries *entries, int64_t data_start) noexcept nogil:
    """Move the entries into the table's columns, in file order, and free them; -1 when there is no memory."""
    cdef size_t count = entries.names.count
    cdef size_t i
    cdef size_t room = 0
    cdef const Row *row
    cdef uint32_t *offsets
    if reserve(<void **> &table.shape_offsets, &room, count + 1, sizeof(uint32_t)) < 0:
        return -1
    table.bounds[0] = data_start
    for i in range(count):
        row = &entries.rows[header_row(entries, i)]
        table.bounds[i + 1] = data_start + <int64_t> row.end
        table.codes[i] = row.dtype
        table.shape_offsets[i] = row.shape
    PyMem_RawFree(entries.rows)  # before the hash slots are made
    entries.rows = NULL
    if entries.order != NULL:
        offsets = <uint32_t *> PyMem_RawRealloc(NULL, count * sizeof(uint32_t))
        if offsets == NULL:
            return -1
        for i in range(count):
            offsets[i] = entries.names.offsets[entries.order[i]]
        PyMem_RawFree(entries.names.offsets)
        entries.names.offsets = offsets
        entries.names.capacity = count
    strings_fit(&entries.names)
    give_back(<void **> &entries.shapes.bytes, &entries.shapes.capacity, entries.shapes.used, 1)
    give_back(<void **> &entries.metadata.bytes, &entries.metadata.capacity, entries.metadata.used, 1)
    return 0


cdef void adopt(HeaderTable table, Entries *entries) noexcept nogil:
    table.names = entries.names
    table.shapes = entries.shapes
    table.metadata_records = entries.metadata
    table.metadata_count = entries.metadata_count
    memset(&entries.names, 0, sizeof(Strings))
    memset(&entries.shapes, 0, sizeof(Arena))
    memset(&entries.metadata, 0, sizeof(Arena))


@cython.final
cdef class _Entries:
    # Owns the entries while they are parsed, and frees them whether parsing succeeds or fails.
    cdef Entries entries

    def __dealloc__(self):
        entries_free(&self.entries)


cdef object entry_error(Reader *reader, Entries *entries, size_t row, bint names_moved, Py_ssize_t base):
    """Return the exception for the reader's fault in the `row`-th tensor of the file, found after the text was read."""
    cdef size_t place = row
    name = None
    if row < entries.names.count:
        place = header_row(entries, row)
        name = text_to_str(strings_at(&entries.names, row if names_moved else place))
    with nogil:
        reader.position = 0
        peek(reader)
        reader.fault_position = member_position(reader, reader.position, place, METADATA_KEY)
    return format_error(reader, base, name)


def parse_header_table(data, *, int64_t data_start, int64_t file_size, Py_ssize_t max_tensors):
    cdef Py_buffer view
    if not 0 <= data_start <= file_size or max_tensors < 0:
        raise ValueError("data_start must lie within the file, and max_tensors cannot be negative")
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len > INT32_MAX:  # offsets into the arenas have 32 bits
            raise ValueError("the text of a header is shorter than 2 GiB")
        return header_table(&view, data_start, file_size, max_tensors)
    finally:
        PyBuffer_Release(&view)


cdef HeaderTable header_table(const Py_buffer *view, int64_t data_start, int64_t file_size, size_t max_tensors):
    cdef Reader reader
    cdef _Entries parsed = _Entries()
    cdef Entries *entries = &parsed.entries
    cdef HeaderTable table = HeaderTable.__new__(HeaderTable)
    cdef int64_t row = -1
    cdef size_t names
    cdef int result
    cdef Py_ssize_t base = data_start - view.len
    memset(&reader, 0, sizeof(Reader))
    reader.text = <const uint8_t *> view.buf
    reader.size = view.len
    with nogil:
        result = read_entries(&reader, entries, max_tensors)
    if result < 0:
        names = entries.names.count
        name = text_to_str(strings_at(&entries.names, names - 1)) if names > entries.complete else None
        raise format_error(&reader, base, name)
    with nogil:
        if not entries.is_sorted:
            result = sort_rows(entries)
        if result == 0:
            row = check_contiguous(&reader, entries, file_size - data_start)
    if row >= 0:
        raise entry_error(&reader, entries, row, False, base)
    if result == 0:
        table.make_arrays(entries.names.count)
        with nogil:
            result = fill_columns(table, entries, data_start)
            if result == 0:
                row = claim_all(&entries.names)
    if result < 0 or row == -2:
        raise MemoryError("no memory to parse the header")
    if row >= 0:
        reader.fault = FAULT_NAME_TWICE
        raise entry_error(&reader, entries, row, True, base)
    adopt(table, entries)
    return table


cdef struct Found:
    uint32_t row
    uint32_t first
    uint32_t second


cdef uint64_t *name_slots(size_t names, size_t *count) noexcept nogil:
    """Allocate slots for `names` names of several tables: 0, or 12 bits of hash, 20 of table, 32 of row plus one."""
    cdef uint64_t *slots = NULL
    cdef size_t room = 0
    count[0] = names + names // 4 + 2
    if reserve(<void **> &slots, &room, count[0], sizeof(uint64_t)) < 0:
        return NULL
    memset(slots, 0, count[0] * sizeof(uint64_t))
    return slots


cdef Py_ssize_t find_duplicates(
    const Strings **tables, uint32_t table_count, uint64_t *slots, size_t slot_count, Found *found, size_t limit
) noexcept nogil:
    """Write at most `limit` names that an earlier table holds too; return how many."""
    cdef size_t number = 0
    cdef size_t row, position
    cdef uint32_t t
    cdef uint64_t text_hashed, entry
    cdef Text text
    for t in range(table_count):
        for row in range(tables[t].count):
            text = strings_at(tables[t], row)
            text_hashed = text_hash(text)
            position = <size_t> (((text_hashed >> 32) * slot_count) >> 32)
            while True:
                entry = slots[position]
                if entry == 0:
                    slots[position] = (text_hashed << 52) | (<uint64_t> t << 32) | (row + 1)
                    break
                if entry >> 52 == text_hashed & 0xFFF and texts_equal(
                    text, strings_at(tables[(entry >> 32) & 0xFFFFF], (entry & 0xFFFFFFFFULL) - 1)
                ):
                    if number == limit:
                        return number
                    found[number].row = <uint32_t> row
                    found[number].first = <uint32_t> ((entry >> 32) & 0xFFFFF)
                    found[number].second = t
                    number += 1
                    break
                position += 1
                if position == slot_count:
                    position = 0
    return number


def duplicate_names(tables, *, Py_ssize_t limit):
    cdef list held = list(tables)  # the caller may change its own list while the GIL is free
    cdef HeaderTable table
    cdef const Strings **strings
    cdef uint64_t *slots
    cdef Found *found
    cdef size_t slot_count
    cdef size_t names = 0
    cdef Py_ssize_t number = -1
    cdef Py_ssize_t i
    cdef uint32_t count = <uint32_t> len(held)
    for table in held:
        names += table.names.count
    if len(held) >= 1 << 20 or names >= UINT32_MAX or limit < 0:
        raise ValueError("more tables or names than can be compared, or a negative limit")
    limit = min(limit, <Py_ssize_t> names)
    strings = <const Strings **> PyMem_RawMalloc((count + 1) * sizeof(Strings *))
    found = <Found *> PyMem_RawMalloc((limit + 1) * sizeof(Found))
    slots = name_slots(names, &slot_count)
    try:
        if strings == NULL or found == NULL or slots == NULL:
            raise MemoryError("no memory to compare the names of headers")
        for i in range(count):
            table = held[i]
            strings[i] = &table.names
        with nogil:
            number = find_duplicates(strings, count, slots, slot_count, found, limit)
        duplicates = []
        for i in range(number):
            table = held[found[i].second]
            duplicates.append((table.name(found[i].row), found[i].first, found[i].second))
        return duplicates
    finally:
        PyMem_RawFree(strings)
        PyMem_RawFree(found)
        PyMem_RawFree(slots)
