# The `weight_map` of a Hugging Face index.json: which file holds each tensor. Other fields are checked as JSON only.
# The rules are those of docs/format.md, "Around the file".

cdef struct Mapping:
    Strings names
    Strings values  # the file of each name, as it is written
    bint has_map
    size_t opening  # of the object in the text

cdef Text WEIGHT_MAP_KEY
WEIGHT_MAP_KEY.start = <const uint8_t *> b"weight_map"
WEIGHT_MAP_KEY.size = 10


cdef int read_index(Reader *reader, Mapping *mapping, size_t max_entries) noexcept nogil:
    cdef Text key
    cdef int more
    cdef bint is_first = True
    if check_utf8(reader) < 0:
        return -1
    if peek(reader) != c'{':
        return fail_here(reader, FAULT_TOP)
    reader.position += 1
    while True:
        more = next_member(reader, is_first, &mapping.names.arena, &key)
        if more < 0:
            return -1
        if more == 0:
            break
        is_first = False
        if texts_equal(key, WEIGHT_MAP_KEY):
            more = read_weight_map(reader, mapping, max_entries)
        else:
            more = skip_value(reader, 1, &mapping.names.arena)
        if more < 0:
            return -1
    if check_end(reader) < 0:
        return -1
    if not mapping.has_map:
        return fail(reader, FAULT_WEIGHT_MAP_MISSING, 0)
    return 0


cdef int read_weight_map(Reader *reader, Mapping *mapping, size_t max_entries) noexcept nogil:
    cdef Text text
    cdef int more
    cdef bint is_first = True
    if mapping.has_map:
        return fail_here(reader, FAULT_WEIGHT_MAP_TWICE)
    if peek(reader) != c'{':
        return fail_here(reader, FAULT_WEIGHT_MAP)
    mapping.has_map = True
    mapping.opening = reader.position
    reader.position += 1
    while True:
        more = next_member(reader, is_first, &mapping.names.arena, &text)
        if more <= 0:
            return more
        is_first = False
        if mapping.names.count == max_entries:
            reader.expected = max_entries
            return fail_here(reader, FAULT_TOO_MANY)
        if strings_append(&mapping.names, text) < 0:
            return fail(reader, FAULT_MEMORY, reader.position)
        if peek(reader) != c'"':
            return fail_here(reader, FAULT_WEIGHT_MAP_VALUE)
        if read_text(reader, &mapping.values.arena, &text) < 0:
            return -1
        if strings_append(&mapping.values, text) < 0:
            return fail(reader, FAULT_MEMORY, reader.position)


cdef int number_files(Mapping *mapping, uint32_t *file_of, uint32_t *first, size_t *files) noexcept nogil:
    """Number the files in order of their first names, which go to `first`; -1 when there is no memory."""
    cdef size_t row
    cdef int64_t earlier
    files[0] = 0
    if strings_make_slots(&mapping.values, mapping.values.count) < 0:
        return -1
    for row in range(mapping.values.count):
        earlier = strings_claim(&mapping.values, row)
        if earlier >= 0:
            file_of[row] = file_of[earlier]
        else:
            file_of[row] = <uint32_t> files[0]
            first[files[0]] = <uint32_t> row
            files[0] += 1
    return 0


cdef size_t absent_names(
    const Strings *names, const uint32_t *file_of, uint32_t file, const Strings *header, uint32_t *rows, size_t limit
) noexcept nogil:
    """Write at most `limit` rows of `names` that are mapped to `file` and not in its header; return how many."""
    cdef size_t number = 0
    cdef size_t row
    for row in range(names.count):
        if number == limit:
            break
        if file_of[row] == file and strings_find(header, strings_at(names, row)) < 0:
            rows[number] = <uint32_t> row
            number += 1
    return number


cdef size_t foreign_names(
    const Strings *names, const uint32_t *file_of, uint32_t file, const Strings *header, uint32_t *rows, size_t limit
) noexcept nogil:
    """Write at most `limit` rows of `header` that `names` does not map to `file`; return how many."""
    cdef size_t number = 0
    cdef size_t row
    cdef int64_t mapped
    for row in range(header.count):
        if number == limit:
            break
        mapped = strings_find(names, strings_at(header, row))
        if mapped < 0 or file_of[mapped] != file:
            rows[number] = <uint32_t> row
            number += 1
    return number


@cython.final
cdef class _Mapping:
    # Owns the mapping while it is parsed, and frees it whether parsing succeeds or fails.
    cdef Mapping mapping

    def __dealloc__(self):
        strings_free(&self.mapping.names)
        strings_free(&self.mapping.values)


@cython.final
cdef class WeightMap:
    """The file of each tensor; made by `parse_weight_map`, and never changed."""

    cdef Strings names
    cdef uint32_t *file_of  # of each name
    cdef uint32_t *first  # name of each file
    cdef readonly tuple files

    def __init__(self):
        raise TypeError("a WeightMap is made by parse_weight_map")

    def __dealloc__(self):
        strings_free(&self.names)
        PyMem_RawFree(self.file_of)
        PyMem_RawFree(self.first)

    def __len__(self):
        return self.names.count

    def find(self, name):
        cdef Py_ssize_t row = strings_find_str(&self.names, name)
        return -1 if row < 0 else self.file_of[row]

    def entry(self, Py_ssize_t index):
        if index < 0 or <size_t> index >= self.names.count:
            raise IndexError(f"no entry {index} in the weight_map")
        return text_to_str(strings_at(&self.names, index)), self.file_of[index]

    def name(self, Py_ssize_t index):
        return self.entry(index)[0]

    def kinds(self, spelling):
        return kinds_of(&self.names, NULL, NULL, NULL, spelling)

    def first_name(self, Py_ssize_t file_index):
        return text_to_str(strings_at(&self.names, self.first[self.checked(file_index)]))

    def compare(self, Py_ssize_t file_index, HeaderTable table not None, *, Py_ssize_t limit):
        cdef uint32_t *rows
        cdef size_t number
        cdef size_t most = max(self.names.count, table.names.count)
        cdef uint32_t file = <uint32_t> self.checked(file_index)
        if limit < 0:
            raise ValueError("limit cannot be negative")
        most = min(most, <size_t> limit)
        rows = <uint32_t *> PyMem_RawMalloc((most + 1) * sizeof(uint32_t))
        if rows == NULL:
            raise MemoryError("no memory to compare names")
        try:
            with nogil:
                number = absent_names(&self.names, self.file_of, file, &table.names, rows, most)
            absent = rows_to_strs(&self.names, rows, number)
            with nogil:
                number = foreign_names(&self.names, self.file_of, file, &table.names, rows, most)
            return absent, rows_to_strs(&table.names, rows, number)
        finally:
            PyMem_RawFree(rows)

    cdef Py_ssize_t checked(self, Py_ssize_t file_index) except -1:
        if self.files is None or not 0 <= file_index < len(self.files):
            raise IndexError(f"no file {file_index} in the weight_map")
        return file_index


def parse_weight_map(data, *, Py_ssize_t max_entries):
    cdef Py_buffer view
    if max_entries < 0:
        raise ValueError("max_entries cannot be negative")
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len > INT32_MAX:  # offsets into the arenas have 32 bits
            raise ValueError("the text of an index is shorter than 2 GiB")
        return weight_map(&view, max_entries)
    finally:
        PyBuffer_Release(&view)


cdef WeightMap weight_map(const Py_buffer *view, size_t max_entries):
    cdef Reader reader
    cdef _Mapping parsed = _Mapping()
    cdef Mapping *mapping = &parsed.mapping
    cdef WeightMap made = WeightMap.__new__(WeightMap)
    cdef int64_t row = -1
    cdef int result
    cdef size_t count
    cdef size_t files = 0
    memset(&reader, 0, sizeof(Reader))
    reader.text = <const uint8_t *> view.buf
    reader.size = view.len
    with nogil:
        result = read_index(&reader, mapping, max_entries)
        if result == 0:
            row = claim_all(&mapping.names)
    if result < 0:
        count = mapping.names.count
        name = text_to_str(strings_at(&mapping.names, count - 1)) if count > mapping.values.count else None
        raise format_error(&reader, 0, name)
    if row >= 0:
        with nogil:
            fail(&reader, FAULT_WEIGHT_MAP_KEY_TWICE, member_position(&reader, mapping.opening, row, NO_KEY))
        raise format_error(&reader, 0, text_to_str(strings_at(&mapping.names, row)))
    count = mapping.names.count
    made.file_of = <uint32_t *> PyMem_RawMalloc((count + 1) * sizeof(uint32_t))
    made.first = <uint32_t *> PyMem_RawMalloc((count + 1) * sizeof(uint32_t))
    if row == -2 or made.file_of == NULL or made.first == NULL:
        raise MemoryError("no memory to parse the index")
    with nogil:
        strings_fit(&mapping.names)
        result = number_files(mapping, made.file_of, made.first, &files)
    if result < 0:
        raise MemoryError("no memory to parse the index")
    made.files = tuple(rows_to_strs(&mapping.values, made.first, files))
    made.names = mapping.names
    memset(&mapping.names, 0, sizeof(Strings))
    return made
