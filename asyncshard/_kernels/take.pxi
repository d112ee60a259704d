# A HeaderTable made of rows of another one: the header of a file slice, without a JSON text.

cdef enum Misfit:
    MISFIT_NONE
    MISFIT_MEMORY
    MISFIT_ROW
    MISFIT_SHAPE
    MISFIT_PART_BYTE
    MISFIT_OVERFLOW
    MISFIT_TWICE

cdef struct ShapeOf:
    uint32_t record  # offset in the arena of shapes
    uint64_t elements


cdef int append_shape(Arena *shapes, ShapeOf *made, shape) except -1:
    """Append the record of a shape to `shapes`, in the form that `read_shape` writes."""
    cdef uint8_t *draft
    cdef uint8_t *end
    cdef uint64_t size
    cdef tuple sizes = tuple(shape)
    made.elements = 1
    if shapes.used > UINT32_MAX:
        raise ValueError("the shapes are too many for one table")
    draft = arena_draft(shapes, 10 * len(sizes))
    if draft == NULL:
        raise MemoryError("no memory for the shapes of a table")
    end = draft
    for value in sizes:
        if not 0 <= value <= UINT64_MAX:
            raise ValueError(f"a dimension is from 0 to 2**64 - 1, not {value}")
        size = value
        if size != 0 and made.elements > UINT64_MAX // size:
            raise ValueError(f"the shape {sizes} has too many elements")
        made.elements *= size
        end = write_varint(end, size)
    made.record = <uint32_t> shapes.used
    if arena_append(shapes, draft, end - draft) < 0:
        raise MemoryError("no memory for the shapes of a table")
    return 0


cdef int append_string(Arena *arena, text) except -1:
    cdef Py_ssize_t size
    cdef const char *start = PyUnicode_AsUTF8AndSize(text, &size)
    if arena_append(arena, <const uint8_t *> start, size) < 0:
        raise MemoryError("no memory for the texts of a table")
    return 0


cdef int append_name(Strings *names, text) except -1:
    cdef Py_ssize_t size
    cdef Text name
    name.start = <const uint8_t *> PyUnicode_AsUTF8AndSize(text, &size)
    name.size = size
    if names.arena.used > UINT32_MAX:
        raise ValueError("the names are too long for one table")
    if strings_append(names, name) < 0:
        raise MemoryError("no memory for the names of a table")
    return 0


cdef Misfit fill_taken(
    HeaderTable table,
    HeaderTable source,
    const int64_t[::1] rows,
    const int[::1] kinds,
    const ShapeOf *shapes,
    size_t shape_count,
    bint has_names,
    int64_t data_start,
    size_t *at,
) noexcept nogil:
    """Fill the columns, and the names unless the table has them; `at` is the place at which a fault was found."""
    cdef size_t room = 0
    cdef size_t count = rows.shape[0]
    cdef size_t i
    cdef int64_t row, reached, nbytes
    cdef int kind
    cdef uint64_t bits
    table.bounds[0] = reached = data_start
    if reserve(<void **> &table.shape_offsets, &room, count + 1, sizeof(uint32_t)) < 0:
        return MISFIT_MEMORY
    for i in range(count):
        at[0] = i
        row = rows[i]
        kind = kinds[i]
        if not 0 <= row < <int64_t> source.names.count:
            return MISFIT_ROW
        if not 0 <= kind < <int64_t> shape_count:
            return MISFIT_SHAPE
        bits = DTYPES_KNOWN[source.codes[row]].bits
        if shapes[kind].elements > INT64_MAX // bits:
            return MISFIT_OVERFLOW
        bits *= shapes[kind].elements
        if bits % 8 != 0:
            return MISFIT_PART_BYTE
        nbytes = bits // 8
        if nbytes > INT64_MAX - reached:
            return MISFIT_OVERFLOW
        reached += nbytes
        table.bounds[i + 1] = reached
        table.codes[i] = source.codes[row]
        table.shape_offsets[i] = shapes[kind].record
        if not has_names and strings_append(&table.names, strings_at(&source.names, row)) < 0:
            return MISFIT_MEMORY
        if not has_names and table.names.arena.used > source.names.arena.used:
            return MISFIT_TWICE  # or the names could take any amount of memory before that is seen
        if i % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
            sched_yield()
    strings_fit(&table.names)
    return MISFIT_NONE


cdef object misfit_error(HeaderTable source, Misfit misfit, const int64_t[::1] rows, const int[::1] kinds, size_t at):
    if misfit == MISFIT_MEMORY:
        return MemoryError("no memory to take rows of a header")
    if misfit == MISFIT_ROW:
        return IndexError(f"no tensor {rows[at]} among {source.names.count}")
    if misfit == MISFIT_SHAPE:
        return IndexError(f"no shape {kinds[at]} for tensor {source.name(rows[at])!r}")
    name = source.name(rows[at])
    if misfit == MISFIT_TWICE:
        return ValueError(f"two tensors would be called {name!r}")
    if misfit == MISFIT_PART_BYTE:
        return ValueError(f"tensor {name!r} would end within a byte")
    return ValueError(f"tensor {name!r} would end beyond 2**63 - 1 bytes")


cdef HeaderTable take_rows(
    HeaderTable source,
    const int64_t[::1] rows,
    const int[::1] kinds,
    shapes,
    names,
    metadata,
    int64_t data_start,
):
    cdef HeaderTable table = HeaderTable.__new__(HeaderTable)
    cdef list held = list(shapes)
    cdef size_t shape_count = len(held)
    cdef size_t at = 0
    cdef size_t i
    cdef int64_t twice = -1
    cdef Misfit misfit
    cdef ShapeOf *made
    cdef bint has_names = names is not None
    if rows.shape[0] != kinds.shape[0] or <size_t> rows.shape[0] > source.names.count or data_start < 0:
        raise ValueError("each row is taken once, with one kind, and data_start is no less than 0")
    for key, value in metadata.items():
        append_string(&table.metadata_records, key)
        append_string(&table.metadata_records, value)
        table.metadata_count += 1
    if has_names:
        for name in names:
            append_name(&table.names, name)
        if table.names.count != <size_t> rows.shape[0]:
            raise ValueError("there must be a name for each row")
    table.make_arrays(rows.shape[0])
    made = <ShapeOf *> PyMem_RawMalloc((shape_count + 1) * sizeof(ShapeOf))
    if made == NULL:
        raise MemoryError("no memory for the shapes of a table")
    try:
        for i in range(shape_count):
            append_shape(&table.shapes, &made[i], held[i])
        with nogil:
            misfit = fill_taken(table, source, rows, kinds, made, shape_count, has_names, data_start, &at)
            if misfit == MISFIT_NONE:
                twice = claim_all(&table.names)
    finally:
        PyMem_RawFree(made)
    give_back(<void **> &table.shapes.bytes, &table.shapes.capacity, table.shapes.used, 1)
    give_back(<void **> &table.metadata_records.bytes, &table.metadata_records.capacity, table.metadata_records.used, 1)
    if misfit == MISFIT_NONE and twice == -2:
        misfit = MISFIT_MEMORY
    if misfit != MISFIT_NONE:
        raise misfit_error(source, misfit, rows, kinds, at)
    if twice >= 0:
        raise ValueError(f"two tensors would be called {table.name(twice)!r}")
    return table
