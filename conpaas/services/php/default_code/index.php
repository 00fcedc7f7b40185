<?php
declare(strict_types=1);
session_start();
$visits = $_SESSION['visits'] = ($_SESSION['visits'] ?? 0) + 1;
$text = static fn (string $value): string => htmlspecialchars($value, ENT_QUOTES | ENT_SUBSTITUTE, 'UTF-8');
?>
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Welcome to ConPaaS</title>
  <link rel="stylesheet" href="style.css">
</head>
<body>
  <main>
    <h1>Welcome to ConPaaS</h1>
    <p>Your PHP service runs. Upload your own application, and this page makes room for it.</p>
    <dl>
      <dt>PHP</dt><dd><?= $text(PHP_VERSION) ?></dd>
      <dt>Answered by</dt><dd><?= $text($_SERVER['SERVER_ADDR'] ?? '') ?></dd>
      <dt>Your visits</dt><dd><?= $visits ?></dd>
      <dt>Server time</dt><dd><?= $text(gmdate('H:i:s')) ?> UTC</dd>
    </dl>
    <p class="hint">Visits are counted in your session, which all back-ends share: reload, and see.</p>
  </main>
</body>
</html>
