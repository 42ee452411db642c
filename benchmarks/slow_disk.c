/* Simulates a disk with latency, for programs that preload this library.
 *
 * The first read of a JPEG file ends SLOW_DISK_MS after its request: the read itself, or an earlier
 * posix_fadvise(WILLNEED). Reading it again, in the next epoch, waits again. Any number of requests run in parallel, and
 * opening a file has no latency: only content is slow, not metadata.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FILES 65536
#define DESCRIPTORS 4096

static struct { ino_t inode; double ready; int asked; } coming[FILES];
static char unread[DESCRIPTORS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double latency(void) {
    const char *text = getenv("SLOW_DISK_MS");
    return text ? atof(text) / 1000 : 0;
}

static int is_image(const char *path) {
    const char *dot = strrchr(path, '.');
    return dot && (!strcasecmp(dot, ".jpg") || !strcasecmp(dot, ".jpeg"));
}

static int is_unread(int fd) { return fd >= 0 && fd < DESCRIPTORS && unread[fd]; }

/* Request a file; being_read also completes the request. Returns the time at which its content is available. */
static double ask(int fd, int being_read) {
    struct stat about;
    if (fstat(fd, &about)) return 0;
    unsigned place = (unsigned)about.st_ino % FILES;
    pthread_mutex_lock(&lock);
    if (coming[place].inode != about.st_ino) {
        coming[place].inode = about.st_ino;
        coming[place].ready = now() + latency();
        coming[place].asked = 0;
    }
    double ready = coming[place].ready;
    /* Requested twice, for two epochs, it is available for both reads. */
    if (!being_read) coming[place].asked++;
    else if (--coming[place].asked <= 0) coming[place].inode = 0;
    pthread_mutex_unlock(&lock);
    return ready;
}

static void wait_until(double ready) {
    double left = ready - now();
    if (left <= 0) return;
    struct timespec t = {(time_t)left, (long)((left - (time_t)left) * 1e9)};
    nanosleep(&t, NULL);
}

static int opened(int fd, const char *path, int flags) {
    if (fd >= 0 && fd < DESCRIPTORS) unread[fd] = (flags & O_ACCMODE) == O_RDONLY && is_image(path);
    return fd;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return opened(real(path, flags, mode), path, flags); \
    }
OPEN(open)
OPEN(open64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        FILE *file = real(path, mode); \
        if (file && is_image(path)) wait_until(ask(fileno(file), 1)); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int fd, void *to, size_t count) {
    REAL(ssize_t, "read", int, void *, size_t);
    if (is_unread(fd)) {
        unread[fd] = 0;
        wait_until(ask(fd, 1));
    }
    return real(fd, to, count);
}

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < DESCRIPTORS) unread[fd] = 0;
    return real(fd);
}

#define ADVISE(name, offset_type) \
    int name(int fd, offset_type begin, offset_type count, int advice) { \
        REAL(int, #name, int, offset_type, offset_type, int); \
        if (advice == POSIX_FADV_WILLNEED && is_unread(fd)) ask(fd, 0); \
        return real(fd, begin, count, advice); \
    }
ADVISE(posix_fadvise, off_t)
ADVISE(posix_fadvise64, off64_t)
