<?php
/**
 * A guest book that lives in the visitor's session: the sample application of ConPaaS.
 *
 * It has no database: what a visitor writes follows him from backend to backend because ConPaaS shares the sessions.
 */

declare(strict_types=1);

const ENTRIES_MAX = 50;
const NAME_MAX = 40;
const TEXT_MAX = 500;

ini_set('session.use_strict_mode', '1');
session_start(['cookie_httponly' => true, 'cookie_samesite' => 'Lax', 'name' => 'guestbook']);
header("Content-Security-Policy: default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'");
header('X-Content-Type-Options: nosniff');
header('Referrer-Policy: same-origin');
header('Cache-Control: no-store');

function e(string $text): string
{
    return htmlspecialchars($text, ENT_QUOTES | ENT_SUBSTITUTE | ENT_HTML5, 'UTF-8');
}

/** One field of the form: valid UTF-8 without control characters, trimmed and cut to its longest length. */
function field(string $name, int $longest): string
{
    $value = $_POST[$name] ?? '';
    $value = is_string($value) ? mb_scrub($value, 'UTF-8') : '';
    $value = preg_replace('/[^\P{C}\n\x{200D}]/u', '', str_replace("\r\n", "\n", $value)) ?? '';
    return mb_substr(trim($value), 0, $longest, 'UTF-8');
}

/** Do what the form asks; return what was wrong with it, if anything. */
function act(string $action): ?string
{
    switch ($action) {
        case 'login':
            $name = preg_replace('/\s+/u', ' ', field('name', NAME_MAX));
            if ($name === '') {
                return 'Please tell us your name.';
            }
            session_regenerate_id();
            $_SESSION['name'] = $name;
            return null;
        case 'write':
            $text = field('text', TEXT_MAX);
            if (!isset($_SESSION['name'])) {
                return 'Please sign in first.';
            }
            if ($text === '') {
                return 'Please write something.';
            }
            array_unshift($_SESSION['entries'], [
                'name' => $_SESSION['name'],
                'text' => $text,
                'time' => time(),
                'backend' => backend(),
            ]);
            $_SESSION['entries'] = array_slice($_SESSION['entries'], 0, ENTRIES_MAX);
            return null;
        case 'logout':
            session_destroy();
            return null;
        default:
            return 'This form does not exist.';
    }
}

/** The address of the instance that answers: all instances of a local cloud share one host name. */
function backend(): string
{
    return $_SERVER['SERVER_ADDR'] ?? gethostname() ?: 'unknown';
}

$_SESSION['token'] ??= bin2hex(random_bytes(16));
$_SESSION['entries'] ??= [];
$error = null;

if ($_SERVER['REQUEST_METHOD'] === 'POST') {
    if (!hash_equals($_SESSION['token'], field('token', 64))) {
        http_response_code(403);
        $error = 'This form was too old. Please try again.';
    } else {
        $error = act(field('action', 20));
        if ($error === null) {
            header('Location: ./', true, 303);
            exit;
        }
        http_response_code(422);
    }
}

$_SESSION['visits'] = ($_SESSION['visits'] ?? 0) + 1;
$_SESSION['backends'][backend()] = ($_SESSION['backends'][backend()] ?? 0) + 1;
ksort($_SESSION['backends'], SORT_NATURAL);
$name = $_SESSION['name'] ?? null;
$version = trim((string) @file_get_contents(__DIR__ . '/version.txt'));
$token = '<input type="hidden" name="token" value="' . e($_SESSION['token']) . '">';
?>
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Guest book</title>
  <link rel="icon" href="logo.svg" type="image/svg+xml">
  <link rel="stylesheet" href="style.css">
</head>
<body>
<header>
  <img src="logo.svg" alt="" width="44" height="44">
  <h1>Guest book</h1>
<?php if ($name !== null) { ?>
  <form method="post">
    <?= $token ?>

    <span>Signed in as <strong id="user"><?= e($name) ?></strong></span>
    <button class="quiet" name="action" value="logout">Sign out</button>
  </form>
<?php } ?>
</header>

<main>
<?php if ($error !== null) { ?>
  <p class="error" role="alert"><?= e($error) ?></p>
<?php } ?>

<?php if ($name === null) { ?>
  <form method="post" class="card">
    <?= $token ?>

    <label for="name">Welcome! What is your name?</label>
    <div class="row">
      <input id="name" name="name" maxlength="<?= NAME_MAX ?>" autocomplete="nickname" required autofocus>
      <button name="action" value="login">Sign in</button>
    </div>
  </form>
<?php } else { ?>
  <form method="post" class="card">
    <?= $token ?>

    <label for="text">Leave a few words, <?= e($name) ?></label>
    <textarea id="text" name="text" rows="3" maxlength="<?= TEXT_MAX ?>" required></textarea>
    <button name="action" value="write">Write</button>
  </form>
<?php } ?>

  <ol class="entries" aria-label="Entries">
<?php foreach ($_SESSION['entries'] as $entry) { ?>
    <li class="card">
      <p><?= nl2br(e($entry['text']), false) ?></p>
      <footer><strong><?= e($entry['name']) ?></strong> · <time datetime="<?= gmdate('c', $entry['time']) ?>"><?= gmdate('j M Y, H:i', $entry['time']) ?> UTC</time> · by way of <code><?= e($entry['backend']) ?></code></footer>
    </li>
<?php } ?>
<?php if ($_SESSION['entries'] === []) { ?>
    <li class="empty">Nothing here yet. Only you can see what you write: it is kept in your session.</li>
<?php } ?>
  </ol>
</main>

<aside class="card">
  <dl>
    <div><dt>Answered by</dt><dd id="backend"><?= e(backend()) ?></dd></div>
    <div><dt>Your visits</dt><dd id="visits"><?= $_SESSION['visits'] ?></dd></div>
    <div><dt>Version</dt><dd id="version"><?= e($version) ?></dd></div>
  </dl>
  <h2>Who answered you so far</h2>
  <ul>
<?php foreach ($_SESSION['backends'] as $address => $count) { ?>
    <li><code><?= e((string) $address) ?></code> <meter min="0" max="<?= $_SESSION['visits'] ?>" value="<?= $count ?>"><?= $count ?></meter> <?= $count ?></li>
<?php } ?>
  </ul>
</aside>
</body>
</html>
