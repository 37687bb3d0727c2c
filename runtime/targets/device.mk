# SPDX-License-Identifier: Apache-2.0
# Rules that all devices share; their Makefiles set CC, CFLAGS, TARGET, LINK, PROGRAM and QEMU.
STANDARD = -std=c99 -Wall -Wextra -Werror
OBJECTS = model.o $(patsubst %.c,%.o,$(wildcard kestrel_*.c sound.c))
HEADERS = $(filter-out sample.h,$(wildcard *.h))
ENTRIES = $(if $(wildcard sound.c),kestrel_sound_start kestrel_sound_push kestrel_sound_finish,kestrel_model_run)

sample.elf: sample.o $(OBJECTS)
	$(CC) $(CFLAGS) $(TARGET) $(PROGRAM) -Wl,--gc-sections $(LINK) -o $@ $^

sample.o: sample.h

run: sample.elf
	$(QEMU) -kernel sample.elf

# The model, the front end and what they call, without an application. image.map says where the bytes are, the .ci files
# what the functions call and how much stack they take.
image.elf: $(OBJECTS)
	$(CC) $(CFLAGS) $(TARGET) -nostartfiles -Wl,--gc-sections -Wl,-Map=image.map $(LINK) \
		$(ENTRIES:%=-Wl,-u,%) -Wl,-e,$(firstword $(ENTRIES)) -o $@ $^

%.o: %.c $(HEADERS)
	$(CC) $(STANDARD) $(CFLAGS) $(TARGET) -ffunction-sections -fdata-sections -fcallgraph-info=su -c -o $@ $<

.PHONY: run
