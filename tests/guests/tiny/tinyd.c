// The only long-lived program of the guest "tiny": process 1 after init has set things up.
// It reaps children, keeps a shell on the serial console, serves HTTP and powers off on the ACPI button.
//   tinyd VERSION [--no-http]
// Settings arrive as environment variables SETTING_NAME.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const char *version;
static pid_t shell = -1;
static time_t shell_started;
static volatile sig_atomic_t asked; // RB_* of the shutdown that a signal asked for

static void on_shutdown_signal(int sig) { asked = sig == SIGTERM ? RB_AUTOBOOT : RB_POWER_OFF; }
static void on_child(int sig) { (void)sig; } // only interrupts poll

static void leave(int how) {
    sync();
    kill(-1, SIGKILL); // everybody but process 1
    while (waitpid(-1, NULL, 0) > 0) {}
    for (int i = 0; i < 2; i++) {
        const char *dir = i ? "/sysroot" : "/data";
        if (umount(dir) && errno != EINVAL && mount(NULL, dir, NULL, MS_REMOUNT | MS_RDONLY, NULL))
            fprintf(stderr, "tiny: cannot unmount %s: %s\n", dir, strerror(errno));
    }
    sync();
    reboot(how);
    _exit(1);
}

static void start_shell(void) {
    time_t now = time(NULL);
    if (now - shell_started < 1) usleep(200000); // no busy loop when the console is gone
    shell_started = now;
    if ((shell = fork())) return;
    signal(SIGTERM, SIG_DFL);
    signal(SIGUSR2, SIG_DFL);
    setsid();
    int fd = open("/dev/ttyS0", O_RDWR);
    if (fd < 0) _exit(1);
    ioctl(fd, TIOCSCTTY, 1);
    for (int i = 0; i < 3; i++) dup2(fd, i);
    if (fd > 2) close(fd);
    chdir("/");
    execl("/bin/busybox", "-sh", NULL);
    _exit(1);
}

// ---- HTTP, one process per connection ----

static int conn;
static char buf[65536]; // what has been read and not used
static size_t have, used;

static void send_all(const void *data, size_t len) {
    for (const char *p = data; len;) {
        ssize_t n = write(conn, p, len);
        if (n <= 0) _exit(1);
        p += n, len -= n;
    }
}

static void finish(void) {
    // An orderly end: nothing unread may turn the answer into a reset.
    shutdown(conn, SHUT_WR);
    alarm(5);
    while (read(conn, buf, sizeof buf) > 0) {}
    _exit(0);
}

static void head(int status, long long length) {
    char h[256];
    const char *why = status == 200 ? "OK" : status == 201 ? "Created" : status == 400 ? "Bad Request"
                    : status == 404 ? "Not Found" : status == 405 ? "Method Not Allowed"
                    : status == 411 ? "Length Required" : "Internal Server Error";
    send_all(h, snprintf(h, sizeof h, "HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %lld\r\n"
                                      "Connection: close\r\n\r\n", status, why, length));
}

static void reply(int status, const char *format, ...) {
    char text[4096];
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(text, sizeof text - 1, format, ap);
    va_end(ap);
    if (n > (int)sizeof text - 2) n = sizeof text - 2;
    text[n++] = '\n';
    head(status, n);
    send_all(text, n);
    finish();
}

static int fill(void) {
    if (used == have) used = have = 0;
    if (have == sizeof buf) return 0;
    ssize_t n = read(conn, buf + have, sizeof buf - have);
    if (n <= 0) return 0;
    have += n;
    return 1;
}

static int read_line(char *line, size_t size) { // without its CRLF
    size_t n = 0;
    for (;;) {
        while (used < have) {
            char c = buf[used++];
            if (c == '\n') {
                if (n && line[n - 1] == '\r') n--;
                line[n] = 0;
                return 1;
            }
            if (n + 1 >= size) return 0;
            line[n++] = c;
        }
        if (!fill()) return 0;
    }
}

static int good_name(const char *s) {
    if (!*s || *s == '.' || strlen(s) > 200) return 0;
    for (; *s; s++)
        if (!isalnum((unsigned char)*s) && !strchr("._-", *s)) return 0;
    return 1;
}

static void copy_body(int fd, long long length) {
    while (length > 0) {
        if (used == have && !fill()) reply(400, "the body ended %lld bytes early", length);
        size_t n = have - used;
        if ((long long)n > length) n = length;
        if (write(fd, buf + used, n) != (ssize_t)n) reply(500, "cannot write: %s", strerror(errno));
        used += n, length -= n;
    }
}

static void put_file(const char *dir, const char *name, long long length, int chunked) {
    char tmp[4400], path[4300], line[128];
    snprintf(tmp, sizeof tmp, "%s/.%s.%d", dir, name, getpid());
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) reply(500, "cannot create %s: %s", path, strerror(errno));
    if (chunked) {
        long long n;
        do {
            if (!read_line(line, sizeof line)) reply(400, "bad chunk");
            n = strtoll(line, NULL, 16);
            if (n < 0) reply(400, "bad chunk");
            copy_body(fd, n);
            if (!read_line(line, sizeof line)) reply(400, "bad chunk");
        } while (n);
    } else copy_body(fd, length);
    int dirfd = open(dir, O_RDONLY | O_DIRECTORY);
    if (fsync(fd) || close(fd) || rename(tmp, path) || dirfd < 0 || fsync(dirfd))
        reply(500, "cannot store %s: %s", path, strerror(errno));
    sync();
    reply(201, "stored %s", path);
}

static void get_file(const char *dir, const char *name) {
    char path[4300];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode)) reply(404, "no %s", path);
    head(200, st.st_size);
    ssize_t n;
    while ((n = read(fd, buf, sizeof buf)) > 0) send_all(buf, n);
    if (n < 0) _exit(1); // the peer sees a short body
    finish();
}

static void list_files(const char *dir) {
    struct dirent **list;
    int n = scandir(dir, &list, NULL, alphasort);
    if (n < 0) reply(500, "cannot list %s: %s", dir, strerror(errno));
    size_t length = 0, done = 0;
    for (int i = 0; i < n; i++)
        if (good_name(list[i]->d_name) && strcmp(list[i]->d_name, "lost+found")) length += strlen(list[i]->d_name) + 1;
    char *text = malloc(length + 1);
    for (int i = 0; i < n; i++)
        if (good_name(list[i]->d_name) && strcmp(list[i]->d_name, "lost+found"))
            done += sprintf(text + done, "%s\n", list[i]->d_name);
    head(200, length);
    send_all(text, length);
    finish();
}

static void md5_of(const char *name) {
    char path[4300], line[128] = "";
    int p[2];
    snprintf(path, sizeof path, "/sysroot/payload/%s", name);
    if (access(path, R_OK)) reply(404, "no %s", path);
    if (pipe(p)) reply(500, "pipe: %s", strerror(errno));
    if (!fork()) {
        dup2(p[1], 1);
        execl("/bin/busybox", "md5sum", path, NULL);
        _exit(1);
    }
    close(p[1]);
    for (size_t n = 0; n < sizeof line - 1;) {
        ssize_t r = read(p[0], line + n, sizeof line - 1 - n);
        if (r <= 0) break;
        n += r;
    }
    if (strlen(line) < 32) reply(500, "cannot read %s", path);
    reply(200, "%.32s", line);
}

static void lines_of(const char *path) {
    int fd = open(path, O_RDONLY), lines = 0;
    ssize_t n;
    while (fd >= 0 && (n = read(fd, buf, sizeof buf)) > 0)
        for (ssize_t i = 0; i < n; i++) lines += buf[i] == '\n';
    reply(200, "%d", lines);
}

static void try_connect(char *target) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    char *colon = strrchr(target, ':');
    if (!colon) reply(400, "want /connect?ADDRESS:PORT");
    *colon = 0;
    a.sin_port = htons(atoi(colon + 1));
    if (!inet_aton(target, &a.sin_addr)) reply(400, "not an IPv4 address: %s", target);
    int s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), e = 0;
    socklen_t len = sizeof e;
    if (!connect(s, (void *)&a, sizeof a)) reply(200, "connected");
    if (errno == EINPROGRESS) {
        struct pollfd p = {.fd = s, .events = POLLOUT};
        if (poll(&p, 1, 5000) <= 0) reply(200, "timeout: no answer within 5 s");
        getsockopt(s, SOL_SOCKET, SO_ERROR, &e, &len);
        if (!e) reply(200, "connected");
    } else e = errno;
    if (e == ETIMEDOUT) reply(200, "timeout: %s", strerror(e));
    reply(200, "refused: %s", strerror(e));
}

static void first_line_of(const char *path, int hex_only) {
    char in[256] = "", out[256];
    int fd = open(path, O_RDONLY), n = 0;
    if (fd < 0 || read(fd, in, sizeof in - 1) < 0) reply(404, "no %s", path);
    for (char *p = in; *p && *p != '\n'; p++)
        if (!hex_only || isxdigit((unsigned char)*p)) out[n++] = hex_only ? tolower((unsigned char)*p) : *p;
    out[n] = 0;
    reply(200, "%s", out);
}

// ---- memory and disk that belong together ----

// Shared by all processes: pages that somebody filled, and a writer that keeps memory and disk in step.
enum { PAGES = 25600, SLOTS = 1024, PAGE = 4096 };
static struct shared {
    volatile unsigned long generation, filled, count, on, running;
    unsigned long pages[PAGES][PAGE / sizeof(long)];
} *shared;

static void fill_pages(long megabytes) {
    unsigned long n = megabytes * 256;
    if (megabytes <= 0 || n > PAGES) reply(400, "want /fill?MEGABYTES, at most %d", PAGES / 256);
    unsigned long g = ++shared->generation;
    for (unsigned long i = 0; i < n; i++)
        for (int k = 0; k < PAGE / 8; k++) shared->pages[i][k] = (g << 40) ^ (i << 12) ^ k;
    shared->filled = n;
    reply(200, "%lu", g);
}

static void check_pages(void) {
    unsigned long bad = 0, g = shared->generation;
    for (unsigned long i = 0; i < shared->filled; i++)
        for (int k = 0; k < PAGE / 8; k++)
            if (shared->pages[i][k] != ((g << 40) ^ (i << 12) ^ k)) { bad++; break; }
    reply(200, "%lu pages of %lu, %lu bad", (unsigned long)shared->filled, g, bad);
}

// Writes slot after slot, each durable before memory counts it.
static void write_on(void) {
    static unsigned long page[PAGE / 8];
    int fd = open("/data/ring", O_RDWR | O_CREAT, 0644);
    while (fd >= 0 && shared->on) {
        unsigned long next = shared->count + 1;
        for (int k = 0; k < PAGE / 8; k++) page[k] = next ^ (unsigned long)k << 40;
        if (pwrite(fd, page, PAGE, next % SLOTS * PAGE) != PAGE || fdatasync(fd)) break;
        shared->count = next;
    }
    shared->running = 0;
    _exit(0);
}

static void count(const char *query) {
    if (!strcmp(query, "on") && !shared->running) {
        shared->on = shared->running = 1;
        if (!fork()) { close(conn); setsid(); write_on(); }
    }
    if (!strcmp(query, "off")) {
        shared->on = 0;
        while (shared->running) usleep(1000);
    }
    reply(200, "%lu", shared->count);
}

// What the disk has, past all caches, is what memory says.
static void check_ring(void) {
    static unsigned long page[PAGE / 8];
    if (shared->running) reply(400, "it is being written; /count?off first");
    sync();
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd < 0 || write(fd, "3\n", 2) != 2) reply(500, "cannot drop caches: %s", strerror(errno));
    close(fd);
    unsigned long last = shared->count, bad = 0;
    fd = open("/data/ring", O_RDONLY);
    for (unsigned long slot = 0; slot < SLOTS; slot++) {
        unsigned long want = last - (last + SLOTS - slot) % SLOTS;
        if (want == 0 || want > last) continue; // not written yet
        if (pread(fd, page, PAGE, slot * PAGE) != PAGE) { bad++; continue; }
        for (int k = 0; k < PAGE / 8; k++)
            if (page[k] != (want ^ (unsigned long)k << 40)) { bad++; break; }
    }
    reply(200, "%lu, %lu bad", last, bad);
}

static void tell_time(const char *query) {
    struct timespec t = {.tv_sec = atol(query)};
    if (*query && clock_settime(CLOCK_REALTIME, &t)) reply(500, "cannot set the clock: %s", strerror(errno));
    reply(200, "%ld", (long)time(NULL));
}

static void serve(void) {
    char line[8192], method[16], path[4096];
    long long length = -1;
    int chunked = 0, expect = 0;
    struct timeval limit = {30, 0};
    setsockopt(conn, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(conn, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(conn, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    if (!read_line(line, sizeof line)) _exit(1);
    if (sscanf(line, "%15s %4095s", method, path) != 2) reply(400, "bad request");
    while (read_line(line, sizeof line) && *line) {
        if (!strncasecmp(line, "content-length:", 15)) length = strtoll(line + 15, NULL, 10);
        if (!strncasecmp(line, "transfer-encoding:", 18)) chunked = strcasestr(line, "chunked") != NULL;
        if (!strncasecmp(line, "expect:", 7)) expect = 1;
    }
    int get = !strcmp(method, "GET") || !strcmp(method, "HEAD"), put = !strcmp(method, "PUT");
    char *query = strchr(path, '?');
    if (query) *query++ = 0; else query = "";
    const char *dir = NULL, *name = NULL;
    if (!strncmp(path, "/notes/", 7)) dir = "/data", name = path + 7;
    if (!strncmp(path, "/sysroot/", 9)) dir = "/sysroot", name = path + 9;
    if (!put && !strncmp(path, "/instance/", 10)) dir = "/run/collective", name = path + 10;
    if (!put && !strncmp(path, "/etc/ssh/", 9)) dir = "/etc/ssh", name = path + 9;
    else if (!put && !strncmp(path, "/etc/", 5)) dir = "/etc", name = path + 5;
    if (put && dir) {
        if (!good_name(name)) reply(400, "bad name");
        if (length < 0 && !chunked) reply(411, "want Content-Length");
        if (expect) send_all("HTTP/1.1 100 Continue\r\n\r\n", 25);
        put_file(dir, name, length, chunked);
    }
    if (!get) reply(405, "only GET, and PUT below /notes/ and /sysroot/");
    if (dir) {
        if (!*name) list_files(dir);
        if (!good_name(name)) reply(404, "no such name");
        get_file(dir, name);
    }
    if (!strcmp(path, "/health")) reply(200, "ok version=%s", version);
    if (!strcmp(path, "/version")) reply(200, "%s", version);
    if (!strcmp(path, "/boots")) lines_of("/sysroot/boots");
    if (!strcmp(path, "/uefi-boots")) first_line_of("/uefi-boots", 0);
    if (!strcmp(path, "/hostname")) first_line_of("/proc/sys/kernel/hostname", 0);
    if (!strcmp(path, "/machine-id")) first_line_of("/sys/class/dmi/id/product_uuid", 1);
    if (!strcmp(path, "/uptime")) first_line_of("/proc/uptime", 0);
    if (!strcmp(path, "/fill")) fill_pages(atol(query));
    if (!strcmp(path, "/pages")) check_pages();
    if (!strcmp(path, "/count")) count(query);
    if (!strcmp(path, "/ring")) check_ring();
    if (!strcmp(path, "/time")) tell_time(query);
    if (!strcmp(path, "/sync")) { sync(); reply(200, "synced"); }
    if (!strcmp(path, "/connect")) try_connect(query);
    if (!strcmp(path, "/read")) {
        if (!good_name(query)) reply(400, "want /read?FILE, a name below /payload");
        md5_of(query);
    }
    if (!strncmp(path, "/setting/", 9)) {
        char key[256];
        int n = snprintf(key, sizeof key, "SETTING_%.200s", path + 9);
        for (int i = 0; i < n; i++) key[i] = key[i] == '-' ? '_' : toupper((unsigned char)key[i]);
        const char *value = getenv(key);
        if (!value) reply(404, "no setting %s", path + 9);
        reply(200, "%s", value);
    }
    reply(404, "no such page");
}

int main(int argc, char **argv) {
    version = argc > 1 ? argv[1] : "?";
    int http = argc < 3;
    struct sigaction child = {.sa_handler = on_child}, down = {.sa_handler = on_shutdown_signal};
    sigaction(SIGCHLD, &child, NULL);
    sigaction(SIGUSR1, &down, NULL); // busybox halt, poweroff and reboot
    sigaction(SIGUSR2, &down, NULL);
    sigaction(SIGTERM, &down, NULL);
    signal(SIGPIPE, SIG_IGN);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) perror("tiny: memory to share");

    struct pollfd p[9];
    int n = 0;
    p[n++] = (struct pollfd){.fd = -1, .events = POLLIN};
    if (http) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(80)};
        int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
        if (bind(s, (void *)&a, sizeof a) || listen(s, 64)) perror("tiny: port 80");
        p[0].fd = s;
    }
    for (int i = 0; i < 8; i++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd >= 0) p[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    fcntl(1, F_SETFD, FD_CLOEXEC);
    for (;;) {
        if (asked) leave(asked);
        for (pid_t pid; (pid = waitpid(-1, NULL, WNOHANG)) > 0;)
            if (pid == shell) shell = -1;
        if (shell < 0) start_shell();
        if (poll(p, n, 10000) <= 0) continue;
        for (int i = 1; i < n; i++) {
            struct input_event e;
            if (p[i].revents & ~POLLIN) p[i].fd = -1;
            else if (p[i].revents)
                while (read(p[i].fd, &e, sizeof e) == sizeof e)
                    if (e.type == EV_KEY && e.code == KEY_POWER && e.value) leave(RB_POWER_OFF);
        }
        if (p[0].revents & POLLIN) {
            conn = accept4(p[0].fd, NULL, NULL, SOCK_CLOEXEC);
            if (conn < 0) continue;
            pid_t pid = fork();
            if (!pid) {
                signal(SIGTERM, SIG_DFL);
                signal(SIGCHLD, SIG_DFL);
                serve();
            }
            close(conn);
        }
    }
}
