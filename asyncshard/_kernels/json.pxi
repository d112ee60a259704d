# A strict JSON reader (RFC 8259, and rules 4 and 5 of docs/format.md) that stores nothing but what its caller asks for.
#
# A fault is sticky: the function that meets it notes the rule and the place in the Reader and returns -1. Every index
# into the text is compared with its size before the byte is read, even where an earlier look has proved it, because
# the caller's buffer may be writable by another thread.

cdef enum Fault:
    FAULT_NONE
    FAULT_MEMORY
    FAULT_UTF8
    FAULT_END
    FAULT_VALUE
    FAULT_KEY
    FAULT_COLON
    FAULT_OBJECT_COMMA
    FAULT_ARRAY_COMMA
    FAULT_CONTROL
    FAULT_ESCAPE
    FAULT_SURROGATE
    FAULT_NUMBER
    FAULT_RANGE
    FAULT_DEPTH
    FAULT_TRAILING
    FAULT_TOP
    FAULT_ENTRY
    FAULT_FIELD_TWICE
    FAULT_NO_DTYPE
    FAULT_NO_SHAPE
    FAULT_NO_OFFSETS
    FAULT_DTYPE
    FAULT_SHAPE
    FAULT_SHAPE_INTEGER
    FAULT_SHAPE_OVERFLOW
    FAULT_BITS_OVERFLOW
    FAULT_PART_BYTE
    FAULT_SIZE
    FAULT_OFFSETS
    FAULT_OFFSETS_REVERSED
    FAULT_METADATA
    FAULT_METADATA_TWICE
    FAULT_METADATA_KEY_TWICE
    FAULT_METADATA_VALUE
    FAULT_NAME_TWICE
    FAULT_CONTIGUITY
    FAULT_COVERAGE
    FAULT_TOO_MANY
    FAULT_WEIGHT_MAP_MISSING
    FAULT_WEIGHT_MAP_TWICE
    FAULT_WEIGHT_MAP
    FAULT_WEIGHT_MAP_VALUE
    FAULT_WEIGHT_MAP_KEY_TWICE

cdef dict FAULT_RULES = {
    FAULT_UTF8: "the text is not valid UTF-8",
    FAULT_END: "the JSON text ends in the middle of a value",
    FAULT_VALUE: "not JSON: a value is expected",
    FAULT_KEY: "not JSON: a string is expected as key",
    FAULT_COLON: "not JSON: ':' is expected after a key",
    FAULT_OBJECT_COMMA: "not JSON: ',' or '}}' is expected",
    FAULT_ARRAY_COMMA: "not JSON: ',' or ']' is expected",
    FAULT_CONTROL: "not JSON: a control character stands in a string without an escape",
    FAULT_ESCAPE: "not JSON: unknown escape in a string",
    FAULT_SURROGATE: "not JSON: a surrogate escape without its other half",
    FAULT_NUMBER: "not JSON: malformed number",
    FAULT_RANGE: "a number is out of the range of a double",
    FAULT_DEPTH: "JSON is nested deeper than {expected} levels",
    FAULT_TRAILING: "not JSON: text follows the value",
    FAULT_TOP: "the top level is not a JSON object",
    FAULT_ENTRY: "the entry is not a JSON object",
    FAULT_FIELD_TWICE: "a field of the entry occurs twice",
    FAULT_NO_DTYPE: "the entry has no dtype",
    FAULT_NO_SHAPE: "the entry has no shape",
    FAULT_NO_OFFSETS: "the entry has no data_offsets",
    FAULT_DTYPE: "dtype is none of the 22 of the format",
    FAULT_SHAPE: "shape is not an array",
    FAULT_SHAPE_INTEGER: "shape holds something else than unsigned 64-bit integers",
    FAULT_SHAPE_OVERFLOW: "the product of the shape overflows 64 bits",
    FAULT_BITS_OVERFLOW: "the number of bits overflows 64 bits",
    FAULT_PART_BYTE: "the shape ends within a byte",
    FAULT_SIZE: "dtype and shape make {expected} bytes, data_offsets {found}",
    FAULT_OFFSETS: "data_offsets is not a pair of unsigned 64-bit integers",
    FAULT_OFFSETS_REVERSED: "data_offsets end before they begin",
    FAULT_METADATA: "__metadata__ is not an object of strings",
    FAULT_METADATA_TWICE: "__metadata__ occurs twice",
    FAULT_METADATA_KEY_TWICE: "a key of __metadata__ occurs twice",
    FAULT_METADATA_VALUE: "a value of __metadata__ is not a string",
    FAULT_NAME_TWICE: "the tensor name occurs twice",
    FAULT_CONTIGUITY: "in order of data_offsets this tensor must begin at {expected}, and begins at {found}",
    FAULT_COVERAGE: "the tensors take {found} bytes, and {expected} follow the header",
    FAULT_TOO_MANY: "more entries than the limit of {expected}",
    FAULT_WEIGHT_MAP_MISSING: "there is no weight_map",
    FAULT_WEIGHT_MAP_TWICE: "weight_map occurs twice",
    FAULT_WEIGHT_MAP: "weight_map is not an object of strings",
    FAULT_WEIGHT_MAP_VALUE: "a file name in weight_map is not a string",
    FAULT_WEIGHT_MAP_KEY_TWICE: "the tensor name occurs twice in weight_map",
}

cdef enum:
    MAX_LEVELS = 127  # of the reference: serde_json refuses the 128th

cdef struct Reader:
    const uint8_t *text
    size_t size
    size_t position
    Fault fault
    size_t fault_position
    uint64_t expected  # for the message, where the rule has numbers
    uint64_t found

# From here on a decimal rounds to infinity: the largest double and half a unit in its last place, 309 digits.
cdef bytes _RANGE_END = str(2**1024 - 2**970).encode()
cdef const char *RANGE_END = _RANGE_END
cdef enum:
    RANGE_END_DIGITS = 309


cdef int fail(Reader *reader, Fault fault, size_t position) noexcept nogil:
    reader.fault = fault
    reader.fault_position = position
    return -1


cdef int fail_here(Reader *reader, Fault fault) noexcept nogil:
    return fail(reader, FAULT_END if reader.position >= reader.size else fault, reader.position)


cdef size_t utf8_sequence(const uint8_t *text, size_t size) noexcept nogil:
    """Return the length of the well-formed sequence that text begins with (Unicode, table 3-7), or 0."""
    cdef uint8_t lead = text[0]
    cdef uint8_t low = 0x80
    cdef uint8_t high = 0xBF
    cdef size_t length, i
    if lead < 0x80:
        return 1
    if lead < 0xC2 or lead > 0xF4:
        return 0
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if length > size:
        return 0
    if lead == 0xE0:
        low = 0xA0
    elif lead == 0xED:
        high = 0x9F
    elif lead == 0xF0:
        low = 0x90
    elif lead == 0xF4:
        high = 0x8F
    if text[1] < low or text[1] > high:
        return 0
    for i in range(2, length):
        if text[i] & 0xC0 != 0x80:
            return 0
    return length


cdef int check_utf8(Reader *reader) noexcept nogil:
    cdef size_t i = 0
    cdef size_t length
    cdef uint64_t word
    while i < reader.size:
        if i + 8 <= reader.size:
            memcpy(&word, reader.text + i, 8)
            if not word & 0x8080808080808080ULL:
                i += 8
                continue
        length = utf8_sequence(reader.text + i, reader.size - i)
        if length == 0:
            return fail(reader, FAULT_UTF8, i)
        i += length
    return 0


cdef inline int peek(Reader *reader) noexcept nogil:
    """Return the next byte that is not white space, without taking it; -1 at the end."""
    cdef size_t i = reader.position
    cdef uint8_t c
    while i < reader.size:
        c = reader.text[i]
        if c > 0x20 or not (c == 0x20 or c == 0x0A or c == 0x0D or c == 0x09):
            reader.position = i
            return c
        i += 1
    reader.position = i
    return -1


cdef int hex_escape(Reader *reader, size_t position, uint32_t *value) noexcept nogil:
    """Read the four hexadecimal digits at `position`."""
    cdef size_t i
    cdef uint8_t c
    value[0] = 0
    if position + 4 > reader.size:
        return fail(reader, FAULT_END, reader.size)
    for i in range(position, position + 4):
        c = reader.text[i]
        if c'0' <= c <= c'9':
            value[0] = value[0] * 16 + (c - c'0')
        elif c'a' <= (c | 0x20) <= c'f':
            value[0] = value[0] * 16 + ((c | 0x20) - c'a' + 10)
        else:
            return fail(reader, FAULT_ESCAPE, i)
    return 0


cdef size_t write_utf8(uint8_t *target, uint32_t code) noexcept nogil:
    if code < 0x80:
        target[0] = <uint8_t> code
        return 1
    if code < 0x800:
        target[0] = <uint8_t> (0xC0 | (code >> 6))
        target[1] = <uint8_t> (0x80 | (code & 0x3F))
        return 2
    if code < 0x10000:
        target[0] = <uint8_t> (0xE0 | (code >> 12))
        target[1] = <uint8_t> (0x80 | ((code >> 6) & 0x3F))
        target[2] = <uint8_t> (0x80 | (code & 0x3F))
        return 3
    target[0] = <uint8_t> (0xF0 | (code >> 18))
    target[1] = <uint8_t> (0x80 | ((code >> 12) & 0x3F))
    target[2] = <uint8_t> (0x80 | ((code >> 6) & 0x3F))
    target[3] = <uint8_t> (0x80 | (code & 0x3F))
    return 4


cdef int read_escape(Reader *reader, size_t *position, uint32_t *code) noexcept nogil:
    """Read the escape whose backslash is at `position`, and move past it: both of them for a surrogate pair."""
    cdef size_t at = position[0]
    cdef uint32_t low
    cdef uint8_t c
    if at + 1 >= reader.size:
        return fail(reader, FAULT_END, reader.size)
    c = reader.text[at + 1]
    position[0] = at + 2
    if c == c'"' or c == c'\\' or c == c'/':
        code[0] = c
    elif c == c'n':
        code[0] = 0x0A
    elif c == c't':
        code[0] = 0x09
    elif c == c'r':
        code[0] = 0x0D
    elif c == c'b':
        code[0] = 0x08
    elif c == c'f':
        code[0] = 0x0C
    elif c == c'u':
        if hex_escape(reader, at + 2, code) < 0:
            return -1
        position[0] = at + 6
        if 0xD800 <= code[0] < 0xE000:
            if code[0] >= 0xDC00:
                return fail(reader, FAULT_SURROGATE, at)
            if at + 8 > reader.size or reader.text[at + 6] != c'\\' or reader.text[at + 7] != c'u':
                return fail(reader, FAULT_SURROGATE, at)
            if hex_escape(reader, at + 8, &low) < 0:
                return -1
            if not 0xDC00 <= low < 0xE000:
                return fail(reader, FAULT_SURROGATE, at)
            code[0] = 0x10000 + ((code[0] - 0xD800) << 10) + (low - 0xDC00)
            position[0] = at + 12
    else:
        return fail(reader, FAULT_ESCAPE, at)
    return 0


cdef inline size_t plain_run(const Reader *reader, size_t i) noexcept nogil:
    """Return where the run of characters ends that a string holds as they are: at a quote, a backslash, a control."""
    cdef uint8_t c
    while i < reader.size:
        c = reader.text[i]
        if c == c'"' or c == c'\\' or c < 0x20:
            break
        i += 1
    return i


cdef int read_text(Reader *reader, Arena *scratch, Text *text) noexcept nogil:
    """Read the string at the opening quote. One with escapes is left as a draft in `scratch`, others in place."""
    cdef size_t start = reader.position + 1
    cdef size_t i = plain_run(reader, start)
    if i < reader.size and reader.text[i] == c'"':
        text.start = reader.text + start
        text.size = i - start
        reader.position = i + 1
        return 0
    return read_escaped_text(reader, start, i, scratch, text)


cdef int read_escaped_text(Reader *reader, size_t start, size_t i, Arena *scratch, Text *text) noexcept nogil:
    cdef size_t end = i
    cdef size_t run
    cdef uint32_t code
    cdef uint8_t *target
    # A first look finds the closing quote, to know how much room to ask for: no escape is shorter than its meaning.
    while end < reader.size and reader.text[end] != c'"':
        if reader.text[end] < 0x20:
            return fail(reader, FAULT_CONTROL, end)
        end = plain_run(reader, end + (2 if reader.text[end] == c'\\' else 0))
    if end >= reader.size:
        return fail(reader, FAULT_END, reader.size)
    target = arena_draft(scratch, end - start)
    if target == NULL:
        return fail(reader, FAULT_MEMORY, start)
    text.start = target
    run = i - start
    memcpy(target, reader.text + start, run)
    target += run
    while i < end:
        if reader.text[i] != c'\\':
            return fail(reader, FAULT_CONTROL, i)
        if read_escape(reader, &i, &code) < 0:
            return -1
        if i > end:
            return fail(reader, FAULT_ESCAPE, end)
        target += write_utf8(target, code)
        run = min(plain_run(reader, i), end) - i
        memcpy(target, reader.text + i, run)
        target += run
        i += run
    text.size = target - text.start
    reader.position = end + 1
    return 0


cdef inline bint is_digit(const Reader *reader, size_t i) noexcept nogil:
    return i < reader.size and c'0' <= reader.text[i] <= c'9'


cdef int skip_number(Reader *reader) noexcept nogil:
    """Check the grammar of the number at the position, and that a double can hold it."""
    cdef size_t i = reader.position
    cdef size_t whole, whole_end, fraction_end
    cdef int64_t exponent = 0
    cdef bint negative = False
    if reader.text[i] == c'-':
        i += 1
    whole = i
    if not is_digit(reader, i):
        return fail(reader, FAULT_END if i >= reader.size else FAULT_NUMBER, i)
    while is_digit(reader, i):
        i += 1
    whole_end = fraction_end = i
    if reader.text[whole] == c'0' and whole_end - whole > 1:
        return fail(reader, FAULT_NUMBER, whole)
    if i < reader.size and reader.text[i] == c'.':
        i += 1
        if not is_digit(reader, i):
            return fail(reader, FAULT_END if i >= reader.size else FAULT_NUMBER, i)
        while is_digit(reader, i):
            i += 1
        fraction_end = i
    if i < reader.size and (reader.text[i] | 0x20) == c'e':
        i += 1
        if i < reader.size and (reader.text[i] == c'-' or reader.text[i] == c'+'):
            negative = reader.text[i] == c'-'
            i += 1
        if not is_digit(reader, i):
            return fail(reader, FAULT_END if i >= reader.size else FAULT_NUMBER, i)
        while is_digit(reader, i):
            if exponent < 1000000000000LL:  # beyond any number of digits that fits the text
                exponent = exponent * 10 + (reader.text[i] - c'0')
            i += 1
    if is_beyond_double(reader, whole, whole_end, fraction_end, -exponent if negative else exponent):
        return fail(reader, FAULT_RANGE, reader.position)
    reader.position = i
    return 0


cdef bint is_beyond_double(
    const Reader *reader, size_t whole, size_t whole_end, size_t fraction_end, int64_t exponent
) noexcept nogil:
    """Return whether a decimal rounds to infinity, decided on its digits: no rounding, no locale, no GIL."""
    cdef size_t i = whole
    cdef size_t k = 0
    cdef int64_t leading
    cdef uint8_t digit
    while i < fraction_end and (reader.text[i] == c'0' or reader.text[i] == c'.'):
        i += 1
    if i >= fraction_end:
        return False  # zero, whatever its exponent
    # The power of ten of the first digit that counts.
    leading = exponent + (<int64_t> (whole_end - i) - 1 if i < whole_end else -<int64_t> (i - whole_end))
    if leading != RANGE_END_DIGITS - 1:
        return leading >= RANGE_END_DIGITS
    while k < RANGE_END_DIGITS:
        while i < fraction_end and reader.text[i] == c'.':
            i += 1
        digit = c'0'
        if i < fraction_end:
            digit = reader.text[i]
            i += 1
        if digit != <uint8_t> RANGE_END[k]:
            return digit > <uint8_t> RANGE_END[k]
        k += 1
    return True


cdef int read_unsigned(Reader *reader, Fault fault, uint64_t *value) noexcept nogil:
    """Read an unsigned 64-bit integer that is written as one: neither 1.0, 1e0 nor -0."""
    cdef size_t i
    cdef uint64_t digit
    cdef uint64_t total = 0
    cdef size_t start
    if peek(reader) < 0:
        return fail_here(reader, fault)
    start = i = reader.position
    while is_digit(reader, i):
        digit = reader.text[i] - c'0'
        if total > UINT64_MAX // 10 or (total == UINT64_MAX // 10 and digit > UINT64_MAX % 10):
            return fail(reader, fault, start)
        total = total * 10 + digit
        i += 1
    if i == start or (reader.text[start] == c'0' and i - start > 1):
        return fail(reader, fault, start)
    if i < reader.size and (reader.text[i] == c'.' or (reader.text[i] | 0x20) == c'e'):
        return fail(reader, fault, start)
    reader.position = i
    value[0] = total
    return 0


cdef int skip_literal(Reader *reader, const char *word, size_t size) noexcept nogil:
    cdef size_t i
    for i in range(size):
        if reader.position + i >= reader.size:
            return fail(reader, FAULT_END, reader.size)
        if reader.text[reader.position + i] != <uint8_t> word[i]:
            return fail(reader, FAULT_VALUE, reader.position)
    reader.position += size
    return 0


cdef inline int next_member(Reader *reader, bint is_first, Arena *scratch, Text *key) noexcept nogil:
    """Inside an object, read the next key and its colon (1), or the closing brace (0)."""
    cdef int c = peek(reader)
    if c == c'}':
        reader.position += 1
        return 0
    if not is_first:
        if c != c',':
            return fail_here(reader, FAULT_OBJECT_COMMA)
        reader.position += 1
        c = peek(reader)
    if c != c'"':
        return fail_here(reader, FAULT_KEY)
    if read_text(reader, scratch, key) < 0:
        return -1
    if peek(reader) != c':':
        return fail_here(reader, FAULT_COLON)
    reader.position += 1
    return 1


cdef inline int next_element(Reader *reader, bint is_first) noexcept nogil:
    """Inside an array, go to the next element (1), or past the closing bracket (0)."""
    cdef int c = peek(reader)
    if c == c']':
        reader.position += 1
        return 0
    if not is_first:
        if c != c',':
            return fail_here(reader, FAULT_ARRAY_COMMA)
        reader.position += 1
    return 1


cdef int skip_scalar(Reader *reader, int c, Arena *scratch) noexcept nogil:
    cdef Text ignored
    if c == c'"':
        return read_text(reader, scratch, &ignored)
    if c == c'-' or c'0' <= c <= c'9':
        return skip_number(reader)
    if c == c't':
        return skip_literal(reader, b"true", 4)
    if c == c'f':
        return skip_literal(reader, b"false", 5)
    if c == c'n':
        return skip_literal(reader, b"null", 4)
    return fail_here(reader, FAULT_VALUE)


cdef int skip_value(Reader *reader, int outer_levels, Arena *scratch) noexcept nogil:
    """Check any value, inside `outer_levels` objects and arrays; no recursion, a bit a level tells the two apart."""
    cdef uint64_t is_object[2]
    cdef uint64_t bit
    cdef int level = outer_levels
    cdef int c, more
    cdef bint is_first
    cdef Text ignored
    is_object[0] = is_object[1] = 0
    while True:
        c = peek(reader)
        is_first = c == c'{' or c == c'['
        if is_first:
            if level == MAX_LEVELS:
                reader.expected = MAX_LEVELS
                return fail_here(reader, FAULT_DEPTH)
            bit = <uint64_t> 1 << (level & 63)
            if c == c'{':
                is_object[level >> 6] |= bit
            else:
                is_object[level >> 6] &= ~bit
            level += 1
            reader.position += 1
        elif skip_scalar(reader, c, scratch) < 0:
            return -1
        while True:  # close what ends here, up to the next value
            if level == outer_levels:
                return 0
            if is_object[(level - 1) >> 6] >> ((level - 1) & 63) & 1:
                more = next_member(reader, is_first, scratch, &ignored)
            else:
                more = next_element(reader, is_first)
            if more < 0:
                return -1
            if more:
                break
            level -= 1
            is_first = False


cdef int check_end(Reader *reader) noexcept nogil:
    """Check that only white space follows the top value."""
    if peek(reader) >= 0:
        return fail_here(reader, FAULT_TRAILING)
    return 0


cdef size_t member_position(Reader *reader, size_t opening, size_t row, Text skipped) noexcept nogil:
    """Return the position of the `row`-th key of the valid object at `opening`, without counting the key `skipped`.

    It is needed for messages only. Storing the position of every key would take memory for each of them.
    """
    cdef Arena scratch
    cdef Text key
    cdef size_t position = opening
    memset(&scratch, 0, sizeof(Arena))
    reader.position = opening + 1
    while True:
        if peek(reader) == c',':
            reader.position += 1
            peek(reader)
        position = reader.position
        # Whether it is first no longer matters, since the comma is behind us.
        if next_member(reader, True, &scratch, &key) <= 0:
            break
        if skipped.size == 0 or not texts_equal(key, skipped):
            if row == 0:
                break
            row -= 1
        if skip_value(reader, 1, &scratch) < 0:
            break
    PyMem_RawFree(scratch.bytes)
    return position


cdef object format_error(const Reader *reader, Py_ssize_t base, object tensor):
    """Return the exception for the reader's fault; `base` is the offset of its text in the file."""
    if reader.fault == FAULT_MEMORY:
        return MemoryError("no memory to parse the header")
    offset = base + <Py_ssize_t> reader.fault_position
    rule = FAULT_RULES[reader.fault].format(expected=reader.expected, found=reader.found)
    subject = "" if tensor is None else f"tensor {shortened(tensor)}: "
    return FormatError(f"{subject}{rule} (byte {offset} of the file)", tensor=tensor, offset=offset)


cdef str shortened(str name):
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}…"
