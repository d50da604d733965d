"""From files to micro-batches. Data flows one way:

sources         rows from files, folders and the hub
chat            a row of messages as chat templates take it
chat_template   what a template writes of a chat, and where each turn stands in it
formats         a row, or a chat, to text segments, trained or not; formatting holds the choices
segments        text segments to token ids
tokenize        rows to a table of tokens, which cache keeps on disk
tokenized       a view of the table: chosen rows, cut at --max_length
packing         which rows share a sequence
order           which rows each step takes
batch           rows to tensors
loader          the data of each step, made ahead; stream reads rows window by window

prepare is the way in: from sources to the training and validation rows of a run. report describes them, and
similarity finds near-duplicates for it.
"""
