/*
 * Remembers how much of each file would survive a power cut.
 *
 * Preloaded into a server, it keeps in the folder DURABLE_LENGTH_DIR one file per inode whose content is the
 * length, as text, up to which that inode was fsynced. What was written before an fsync began is durable once it
 * has returned; what came later is not. After SIGKILL, a test cuts each file back to its durable length.
 *
 * Where DURABLE_LENGTH_DELAY names a file, each fsync waits first for as many milliseconds as the file says: a slow
 * disk, whose speed a test changes while the server runs.
 *
 * Only lengths are modelled, which is enough for files that grow at their end. Names are taken as durable at
 * once: the server under test fsyncs its folder after each rename.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static void *next_symbol(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);
    if (symbol == NULL)
        abort();
    return symbol;
}

static int record_path(const struct stat *status, char *path, size_t size)
{
    const char *folder = getenv("DURABLE_LENGTH_DIR");
    if (folder == NULL || !S_ISREG(status->st_mode))
        return 0;
    snprintf(path, size, "%s/%llu", folder, (unsigned long long)status->st_ino);
    return 1;
}

static void record_length(const struct stat *status, off_t length)
{
    static int (*real_open)(const char *, int, ...);
    char path[4096], text[32];
    if (!record_path(status, path, sizeof path))
        return;
    if (real_open == NULL)
        real_open = next_symbol("open64");
    int fd = real_open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        abort();
    /* One write of one width: a kill can't leave half a number. */
    int count = snprintf(text, sizeof text, "%020lld", (long long)length);
    if (pwrite(fd, text, (size_t)count, 0) != count)
        abort();
    close(fd);
}

/* An empty file may have the inode of one that was deleted, whose record must not count for it. */
static void forget_if_empty(int fd)
{
    struct stat status;
    char path[4096];
    if (fd >= 0 && fstat(fd, &status) == 0 && status.st_size == 0 && record_path(&status, path, sizeof path))
        unlink(path);
}

static void delay(void)
{
    static int (*real_open)(const char *, int, ...);
    const char *path = getenv("DURABLE_LENGTH_DELAY");
    char text[16] = "";
    if (path == NULL)
        return;
    if (real_open == NULL)
        real_open = next_symbol("open64");
    int fd = real_open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (read(fd, text, sizeof text - 1) > 0)
        usleep((useconds_t)atoi(text) * 1000);
    close(fd);
}

static int sync_and_record(int fd, int (*real)(int))
{
    delay();
    struct stat before;
    int known = fstat(fd, &before) == 0;
    int result = real(fd);
    if (result == 0 && known)
        record_length(&before, before.st_size);
    return result;
}

int fsync(int fd)
{
    static int (*real)(int);
    if (real == NULL)
        real = next_symbol("fsync");
    return sync_and_record(fd, real);
}

int fdatasync(int fd)
{
    static int (*real)(int);
    if (real == NULL)
        real = next_symbol("fdatasync");
    return sync_and_record(fd, real);
}

#define OPEN(name)                                                                                                  \
    int name(const char *path, int flags, ...)                                                                      \
    {                                                                                                               \
        static int (*real)(const char *, int, ...);                                                                 \
        mode_t mode = 0;                                                                                            \
        if (real == NULL)                                                                                           \
            real = next_symbol(#name);                                                                              \
        if (flags & O_CREAT) {                                                                                      \
            va_list arguments;                                                                                      \
            va_start(arguments, flags);                                                                             \
            mode = va_arg(arguments, mode_t);                                                                       \
            va_end(arguments);                                                                                      \
        }                                                                                                           \
        int fd = real(path, flags, mode);                                                                           \
        if (flags & (O_WRONLY | O_RDWR))                                                                            \
            forget_if_empty(fd);                                                                                    \
        return fd;                                                                                                  \
    }

OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                                                                 \
    FILE *name(const char *path, const char *mode)                                                                  \
    {                                                                                                               \
        static FILE *(*real)(const char *, const char *);                                                           \
        if (real == NULL)                                                                                           \
            real = next_symbol(#name);                                                                              \
        FILE *file = real(path, mode);                                                                              \
        if (file != NULL && mode[0] != 'r')                                                                         \
            forget_if_empty(fileno(file));                                                                          \
        return file;                                                                                                \
    }

FOPEN(fopen)
FOPEN(fopen64)

/* Cut shorter, then grown again: what grows is not durable because the old end was. */
#define FTRUNCATE(name, offset)                                                                                     \
    int name(int fd, offset length)                                                                                 \
    {                                                                                                               \
        static int (*real)(int, offset);                                                                            \
        struct stat before;                                                                                         \
        if (real == NULL)                                                                                           \
            real = next_symbol(#name);                                                                              \
        int known = fstat(fd, &before) == 0;                                                                        \
        int result = real(fd, length);                                                                              \
        if (result == 0 && known && length < before.st_size)                                                        \
            record_length(&before, 0);                                                                              \
        return result;                                                                                              \
    }

FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
